"""One-to-one and one-to-many matching against numbers of the released code, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners import (
    HungarianAssigner,
    IoUAssigner,
    OneToManyAssigner,
    RankWeightedAssigner,
    RepeatedAssigner,
    SimOtaAssigner,
    UnionAssigner,
)
from detrelay.assigners.costs import FocalClassCost, GIoUBoxCost, L1BoxCost, default_costs
from detrelay.assigners.owners import last_of_query
from detrelay.core.criterion import Criterion
from detrelay.core.loss_terms import task_alignment
from detrelay.core.losses import LossConfig
from detrelay.core.structures import Assignment, Pairs, StagePrediction
from target_vectors import (
    Scene,
    check_losses,
    check_pairs,
    check_stages,
    check_total,
    check_values,
    close,
    group,
    image_pairs,
    run,
    scene,
    scene_names,
    stage_pairs,
)

BY_TARGETS: dict[str, Any] = {
    "class_divisor": "targets",
    "l1_divisor": "targets",
    "giou_divisor": "targets",
}
FOCAL = LossConfig(log_epsilon=1e-8, **BY_TARGETS)
HUNGARIAN = HungarianAssigner(default_costs(FOCAL))
BOXES = {"l1": "loss_bbox", "giou": "loss_giou"}
NAMES = {"class": "loss_ce", **BOXES}


def scenes(method: str) -> Any:
    return pytest.mark.parametrize("name", scene_names(method))


@scenes("hdetr")
def test_hdetr(name: str) -> None:
    one = scene("hdetr", name)
    k, factor = int(one.number("k")), one.number("lambda")
    extra = LossConfig(
        class_divisor=f"targets*{k}", l1_divisor=f"targets*{k}", giou_divisor=f"targets*{k}"
    )
    criterion = Criterion(
        FOCAL.terms(),
        {
            "decoder": HUNGARIAN,
            "extra": RepeatedAssigner(k, costs=HUNGARIAN.costs),
            "proposals": HUNGARIAN,
        },
        {"extra": factor},
        group_terms={"extra": extra.terms()},
    )
    groups = [
        group("decoder", one.stages()),
        group("extra", one.stages("extra")),
        group("proposals", [one.proposals()], class_agnostic=True),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", "match.decoder")
    check_stages(output, one, "extra", "match.extra")
    check_pairs(
        output.assignments["proposals"][0].boxes, image_pairs(one, "match.proposals"), one.targets
    )
    check_losses(output.losses, one, NAMES)
    check_losses(output.losses, one, NAMES, "extra", "_one2many", factor)
    check_losses(output.losses, one, NAMES, "proposals", "_enc")
    check_total(output, one)


class Drawn(OneToManyAssigner):
    """Keeps the positives that a released run drew."""

    def draw_from(self, one: Scene, where: str = "draw.positives") -> Drawn:
        self.one, self.where = one, where
        return self

    def choose(self, tables: Any, stage: int, image: int) -> Any:
        self.key = f"{self.where}.{stage}.{image}"
        return super().choose(tables, stage, image)

    def kept(self, positive: NDArray[np.int64], best: Any, limit: int) -> NDArray[np.int64]:
        return positive[self.one.expected[self.key].numpy()[:limit]]


@scenes("msdetr")
def test_msdetr(name: str) -> None:
    one = scene("msdetr", name)
    first = LossConfig(class_weight=1, **BY_TARGETS)
    criterion = Criterion(
        FOCAL.terms(),
        {
            "decoder": HUNGARIAN,
            "many": Drawn().draw_from(one),
            "proposals": HungarianAssigner((L1BoxCost(), GIoUBoxCost()), boxes="references"),
        },
        group_terms={"decoder": first.terms()},
    )
    proposals = one.proposals()
    anchored = StagePrediction(proposals.logits, proposals.boxes, one.inputs["anchors"])
    groups = [
        group("decoder", one.stages()),
        group("many", one.stages("twin"), slots="decoder"),
        group("proposals", [anchored], class_agnostic=True),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", "match.decoder")
    for stage, assignment in enumerate(output.assignments["many"]):
        check_pairs(assignment.boxes, stage_pairs(one, "match.many", stage), one.targets, True)
    check_pairs(
        output.assignments["proposals"][0].boxes, image_pairs(one, "match.proposals"), one.targets
    )
    check_losses(output.losses, one, NAMES)
    check_losses(output.losses, one, NAMES, "many", "_o2m")
    check_losses(output.losses, one, NAMES, "proposals", "_enc")
    check_total(output, one)


class Released(RankWeightedAssigner):
    """DAC-DETR's weights are in float32 whatever the rest is, and classes are written in order.

    So of two targets of one class that a query serves, the last one's score is what it learns.
    """

    def __call__(self, stages: Any, targets: Any) -> list[Assignment]:
        def single(pairs: Pairs) -> Pairs:
            assert pairs.weight is not None
            rank = -self.tau * pairs.weight.log()
            return replace(pairs, weight=(-rank.float() / self.tau).exp().double())

        def last(pairs: Pairs) -> Pairs:
            entries = torch.stack([pairs.image, pairs.query, targets.labels[pairs.target]], dim=1)
            newest = {tuple(entry): row for row, entry in enumerate(entries.tolist())}
            return pairs.select(torch.tensor(sorted(newest.values()), dtype=torch.int64))

        return [
            Assignment(classes=last(single(each.classes)), boxes=single(each.boxes))
            for each in super().__call__(stages, targets)
        ]


@scenes("dacdetr")
def test_dacdetr(name: str) -> None:
    one = scene("dacdetr", name)
    aligned: dict[str, Any] = {"class_weight": 1, "class_loss": "ia_bce"}
    many = LossConfig(
        **aligned, class_divisor="targets*3", l1_divisor="targets*3", giou_divisor="targets*3"
    )
    rule = OneToManyAssigner(max_positives=75, one_class=False, boxes="references")
    criterion = Criterion(
        FOCAL.terms(),
        {
            "decoder": Released(HUNGARIAN),
            "many": Released(rule),
            "proposals": HUNGARIAN,
        },
        group_terms={
            "decoder": LossConfig(**aligned, **BY_TARGETS).terms(),
            "many": many.terms(),
        },
    )
    twins = [
        StagePrediction(twin.logits, twin.boxes, stage.boxes)
        for twin, stage in zip(one.stages("twin"), one.stages(), strict=True)
    ]
    groups = [
        group("decoder", one.stages()),
        group("many", twins, slots="decoder"),
        group("proposals", [one.proposals()], class_agnostic=True),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", "match.decoder")
    for stage, assignment in enumerate(output.assignments["many"]):
        check_pairs(assignment.boxes, stage_pairs(one, "match.many", stage), one.targets, True)
    for own in groups[:2]:
        check_values(
            output,
            one,
            own.name,
            own.stages,
            lambda stage, pairs: task_alignment(stage, one.targets, pairs),
        )
    check_losses(output.losses, one, NAMES, suffix="_one2one")
    check_losses(output.losses, one, NAMES, "many")
    check_losses(output.losses, one, NAMES, "proposals", "_enc")
    check_total(output, one)


class DrawnByOverlap(IoUAssigner):
    """DETA's released rule: drawn positives, no guard, a query's class is its last target's."""

    def draw_from(self, one: Scene, where: str) -> DrawnByOverlap:
        self.one, self.where = one, where
        return self

    def choose(self, tables: Any, stage: int, image: int) -> Any:
        self.key = f"draw.positives.{self.where}.{image}"
        return super().choose(tables, stage, image)

    def kept(self, positive: NDArray[np.int64], best: Any, limit: int) -> NDArray[np.int64]:
        return positive[self.one.expected[self.key].numpy()[:limit]]

    def positives(self, score: Any) -> NDArray[np.bool_]:
        unguarded: NDArray[np.bool_] = super().positives(score)
        return unguarded | (score == score.max(1, keepdims=True)).any(0)

    def _single_class(self, pairs: Any, score: Any) -> Any:
        return last_of_query(pairs), pairs


@scenes("deta")
def test_deta(name: str) -> None:
    one = scene("deta", name)
    loss = LossConfig(class_weight=1, **BY_TARGETS)
    criterion = Criterion(
        loss.terms(),
        {
            "decoder": DrawnByOverlap(boxes="initial").draw_from(one, "decoder"),
            "proposals": DrawnByOverlap(
                threshold=0.7, max_positives=128, boxes="references"
            ).draw_from(one, "proposals"),
        },
    )
    start = one.inputs["twin_boxes"][0]
    stages = [StagePrediction(s.logits, s.boxes, start) for s in one.stages()]
    proposals = one.proposals()
    anchored = StagePrediction(proposals.logits, proposals.boxes, one.inputs["anchors"])
    groups = [
        group("decoder", stages),
        group("proposals", [anchored], class_agnostic=True),
    ]
    output = run(criterion, groups, one)
    for assignment in output.assignments["decoder"]:
        check_pairs(assignment.boxes, image_pairs(one, "match.decoder"), one.targets, True)
    check_pairs(
        output.assignments["proposals"][0].boxes, image_pairs(one, "match.proposals"), one.targets
    )
    check_losses(output.losses, one, NAMES)
    check_losses(output.losses, one, NAMES, "proposals", "_enc")
    check_total(output, one)


@scenes("simota")
def test_simota(name: str) -> None:
    one = scene("simota", name)
    loss = LossConfig(
        l1_format="xyxy", class_divisor="pairs", l1_divisor="pairs", giou_divisor="pairs"
    )
    costs = (FocalClassCost(epsilon=1e-8), L1BoxCost(box_format="xyxy"), GIoUBoxCost())
    criterion = Criterion(loss.terms(), {"decoder": SimOtaAssigner(costs)})
    output = run(criterion, [group("decoder", one.stages())], one)
    check_stages(output, one, "decoder", "match.decoder")
    check_losses(output.losses, one, NAMES)
    check_total(output, one)


@pytest.mark.parametrize(("method", "loss"), [("dfine", "varifocal"), ("deim", "matchability")])
@pytest.mark.parametrize("name", scene_names("dfine"))
def test_union(method: str, loss: str, name: str) -> None:
    one = scene(method, name)
    terms = LossConfig(class_weight=1, class_loss=loss, class_divisor="targets").terms()
    criterion = Criterion(
        terms,
        {"decoder": UnionAssigner(HUNGARIAN)},
        joins={"pre": "decoder", "proposals": "decoder"},
    )
    num_queries = one.inputs["logits"].shape[2]
    groups = [
        group("decoder", one.stages()),
        group("pre", one.stages("twin")[:1], slots="decoder"),
        group("proposals", [one.proposals(num_queries)], slots="decoder"),
    ]
    output = run(criterion, groups, one)
    for stage, assignment in enumerate(output.assignments["decoder"]):
        check_pairs(assignment.classes, stage_pairs(one, "match.decoder", stage), one.targets)
    union = image_pairs(one, "match.union")
    for kind in ("pre", "proposals"):
        (assignment,) = output.assignments[kind]
        check_pairs(assignment.classes, image_pairs(one, f"match.{kind}"), one.targets)
    for assignments in output.assignments.values():
        for assignment in assignments:
            check_pairs(assignment.boxes, union, one.targets)
            assert len(assignment.boxes) == one.number("num_union_pairs")
    check_weighted(output.losses, one, terms, "loss_mal" if method == "deim" else "loss_vfl")
    check_total(output, one)
    check_entries(output, groups, one, terms[0])


@scenes("rtdetr")
def test_rtdetr(name: str) -> None:
    one = scene("rtdetr", name)
    terms = LossConfig(class_weight=1, class_loss="varifocal", **BY_TARGETS).terms()
    criterion = Criterion(terms, {"decoder": HUNGARIAN, "proposals": HUNGARIAN})
    num_queries = one.inputs["logits"].shape[2]
    groups = [
        group("decoder", one.stages()),
        group("proposals", [one.proposals(num_queries)]),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", "match.decoder")
    check_weighted(output.losses, one, terms, "loss_vfl")
    check_total(output, one)
    check_entries(output, groups, one, terms[0])


def check_weighted(losses: dict[str, Tensor], one: Scene, terms: Any, class_name: str) -> None:
    """Compare losses that the released code returns with their weights inside."""
    names = {"class": class_name, **BOXES}
    weights = {term.name: term.weight for term in terms}
    last = max(int(key.split("/")[1]) for key in losses if key.startswith("decoder"))
    checked = 0
    for key, loss in losses.items():
        kind, stage, term = key.split("/")
        suffix = {"pre": "_pre", "proposals": "_enc_0"}.get(kind, f"_aux_{stage}")
        if kind == "decoder" and int(stage) == last:
            suffix = ""
        wanted = one.expected[f"weighted.{names[term]}{suffix}"]
        close(loss * weights[term], wanted, 1e-10, key)
        checked += 1
    assert checked == sum(key.startswith("weighted.") for key in one.expected)


def check_entries(output: Any, groups: Any, one: Scene, term: Any) -> None:
    """Compare the dense class targets and weights."""
    for stages in groups:
        for index, stage in enumerate(stages.stages):
            pairs = output.assignments[stages.name][index].classes
            found = term.entries(stage, one.targets, pairs)
            where = f"decoder.{index}" if stages.name == "decoder" else stages.name
            for values, what in zip(found, ("class_target", "class_weight"), strict=True):
                expected = one.expected[f"{what}.{where}"].double()
                torch.testing.assert_close(values.detach(), expected, rtol=0, atol=1e-6)
