"""Class losses, costs and weights against numbers of the released code, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detrelay.assigners import (
    HungarianAssigner,
    IoUAssigner,
    RankWeightedAssigner,
    RepeatedAssigner,
    RestrictedAssigner,
)
from detrelay.assigners.costs import (
    GIoUBoxCost,
    HighOrderCost,
    L1BoxCost,
    PositionModulatedClassCost,
    SoftmaxClassCost,
    default_costs,
)
from detrelay.assigners.tables import overlap_table, rows_of
from detrelay.core.boxes import cxcywh_to_xyxy, giou
from detrelay.core.class_losses import (
    PositionSupervisedClassLoss,
    RankGiouClassLoss,
    SoftmaxClassLoss,
    VarifocalClassLoss,
    score_gap_loss,
)
from detrelay.core.criterion import Criterion
from detrelay.core.loss_terms import Divisor, paired_overlap, score_targets, task_alignment
from detrelay.core.losses import LossConfig
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets
from target_vectors import (
    Scene,
    check_losses,
    check_pairs,
    check_stages,
    check_total,
    check_values,
    close,
    denoising_groups,
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
# detrex adds this to the denominators of IoU and GIoU
EPSILON = 1e-6
DETREX: dict[str, Any] = {"giou_epsilon": EPSILON, "log_epsilon": 1e-8, **BY_TARGETS}
NAMES = {"class": "loss_class", "l1": "loss_bbox", "giou": "loss_giou"}
NOISY = {term: f"{name}_dn" for term, name in NAMES.items()}


def scenes(method: str) -> Any:
    return pytest.mark.parametrize("name", scene_names(method))


def noise_factor(one: Scene) -> float:
    """Without objects the released code still divide by the number of denoising groups."""
    if len(one.targets) or "dn.groups" not in one.expected:
        return 1.0
    return 1 / one.number("dn.groups")


class OneFitForAClass(PositionModulatedClassCost):
    """The released cost: a class has one fit, that of its last target in the whole batch."""

    def fit(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        batch, num_queries, num_classes = prediction.logits.shape
        predicted = cxcywh_to_xyxy(prediction.boxes)[:, :, None]  # [B, Q, 1, 4]
        overlap = giou(predicted, cxcywh_to_xyxy(targets.boxes), self.giou_epsilon)  # [B, Q, T]
        fit = prediction.logits.new_zeros(batch, num_queries, num_classes)
        for target, label in enumerate(targets.labels.tolist()):
            fit[..., label] = (overlap[..., target] + 1) / 2
        scale = (1 / (fit.flatten(1).amax(1) + 1e-8)).clamp(min=1)
        return (fit * scale[:, None, None])[targets.image, :, targets.labels]


@scenes("stabledino")
def test_stabledino(name: str) -> None:
    one = scene("stabledino", name)
    loss = LossConfig(class_weight=6, class_loss="position_supervised", **DETREX)
    noisy = LossConfig(class_weight=1, class_loss="position_supervised", **DETREX)
    costs = (OneFitForAClass(giou_epsilon=EPSILON), *default_costs(loss)[1:])
    assigner = HungarianAssigner(costs)
    criterion = Criterion(
        loss.terms(),
        {"decoder": assigner, "proposals": assigner},
        {"denoising": (noise := noise_factor(one))},
        group_terms={"denoising": noisy.terms()},
    )
    groups = [
        group("decoder", one.stages()),
        group("proposals", [one.proposals()]),
        *denoising_groups(one),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", "match.decoder")
    check_pairs(
        output.assignments["proposals"][0].boxes, image_pairs(one, "match.proposals"), one.targets
    )
    term = PositionSupervisedClassLoss(epsilon=EPSILON)

    def aims(stage: StagePrediction, pairs: Pairs) -> Tensor:
        return term.pair_scores(stage, one.targets, pairs)

    check_values(output, one, "decoder", one.stages(), aims)
    check_losses(output.losses, one, NAMES, rel=5e-7)
    check_losses(output.losses, one, NAMES, "proposals", "_enc", rel=5e-7)
    if len(groups) > 2:
        check_losses(output.losses, one, NOISY, "denoising", scale=noise, rel=5e-7)
    check_total(output, one, rel=5e-7, grad=5e-6)


class Stuck(RepeatedAssigner):
    """The released limit: once lowered by an image it stays for later images, down to none."""

    def choose(self, tables: Any, stage: int, image: int) -> Any:
        if not hasattr(self, "left"):
            self.left: dict[int, int] = {}
        num_targets, num_queries = tables.shape[1:]
        times = self.left.get(stage, self.times[stage if len(self.times) > 1 else 0])
        self.left[stage] = min(times, int(num_queries * 0.5 / num_targets))
        if not self.left[stage]:
            return rows_of(np.zeros(0), np.zeros(0)), rows_of(np.zeros(0), np.zeros(0))
        pairs = RepeatedAssigner(self.left[stage]).choose(tables, 0, image)[0]
        return pairs, pairs


@scenes("aligndetr")
def test_aligndetr(name: str) -> None:
    one = scene("aligndetr", name)
    loss = LossConfig(class_weight=1, class_loss="ia_bce", **DETREX)
    first, *rest = one.expected["match_number"].tolist()
    costs = default_costs(loss)
    criterion = Criterion(
        loss.terms(),
        {
            "decoder": RankWeightedAssigner(Stuck(rest, costs=costs), epsilon=EPSILON),
            "proposals": RankWeightedAssigner(Stuck(first, costs=costs), epsilon=EPSILON),
        },
        {"denoising": (noise := noise_factor(one))},
    )
    groups = [
        group("decoder", one.stages()),
        group("proposals", [one.proposals()]),
        *denoising_groups(one),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", "match.decoder")
    check_values(
        output,
        one,
        "decoder",
        one.stages(),
        lambda stage, pairs: task_alignment(stage, one.targets, pairs, EPSILON),
    )
    check_pairs(
        output.assignments["proposals"][0].boxes, image_pairs(one, "match.proposals"), one.targets
    )
    check_losses(output.losses, one, NAMES, rel=1e-6)
    check_losses(output.losses, one, NAMES, "proposals", "_enc", rel=1e-6)
    if len(groups) > 2:
        check_losses(output.losses, one, NOISY, "denoising", scale=noise, rel=1e-6)
    check_total(output, one, rel=1e-6, grad=1e-6)


def by_groups(one: Scene) -> list[Any]:
    """Query groups that lie side by side."""
    count = int(one.number("groups"))
    size = one.inputs["group_logits"].shape[2] // count
    parts = []
    for index in range(count):
        rows = slice(index * size, (index + 1) * size)
        stages = [
            replace(stage, logits=stage.logits[:, rows], boxes=stage.boxes[:, rows])
            for stage in one.stages("group")
        ]
        parts.append(group(f"group/{index}", stages))
    return parts


@scenes("groupdetr")
def test_groupdetr(name: str) -> None:
    one = scene("groupdetr", name)
    divisor = f"targets*{int(one.number('groups'))}"
    loss = LossConfig(
        giou_epsilon=EPSILON,
        log_epsilon=1e-8,
        class_divisor=divisor,
        l1_divisor=divisor,
        giou_divisor=divisor,
    )
    groups = by_groups(one)
    assigner = HungarianAssigner(default_costs(loss))
    output = run(Criterion(loss.terms(), {own.name: assigner for own in groups}), groups, one)
    size, stages = groups[0].stages[0].logits.shape[1], len(groups[0].stages)
    for stage in range(stages):
        parts = []
        for index, own in enumerate(groups):
            pairs = output.assignments[own.name][stage].boxes
            parts.append(replace(pairs, query=pairs.query + index * size))
        check_pairs(Pairs.cat(parts), stage_pairs(one, "match.group", stage), one.targets)
    summed = {
        f"decoder/{stage}/{term}": torch.stack(
            [output.losses[f"{own.name}/{stage}/{term}"] for own in groups]
        ).sum()
        for stage in range(stages)
        for term in NAMES
    }
    check_losses(summed, one, NAMES)
    check_total(output, one)


LWDETR: dict[str, dict[str, Any]] = {
    "ia_bce_sum": {"class_loss": "ia_bce"},
    "ia_bce_mean": {"class_loss": "ia_bce"},
    "position_mean": {"class_loss": "position_supervised", "class_options": {"power": 1.0}},
    "varifocal_mean": {"class_loss": "varifocal", "class_options": {"detach": False}},
}


class ZeroIsNegative(VarifocalClassLoss):
    """LW-DETR takes pairs whose boxes do not overlap for negatives."""

    def entries(self, prediction: Any, targets: Targets, pairs: Pairs) -> tuple[Tensor, Tensor]:
        overlap = paired_overlap(prediction, targets, pairs)
        return super().entries(prediction, targets, pairs.select(overlap > 0))


class ZeroPositionIsNegative(PositionSupervisedClassLoss):
    """The same for the loss that aims at positions."""

    def __call__(self, prediction: Any, targets: Any, assignment: Any, normalizers: Any) -> Tensor:
        pairs = assignment.classes
        pairs = pairs.select(paired_overlap(prediction, targets, pairs) > 0)
        return super().__call__(
            prediction, targets, replace(assignment, classes=pairs), normalizers
        )


class GroupByGroup:
    """Groups that lie side by side in one prediction, each matched for itself."""

    def __init__(self, assigner: HungarianAssigner, count: int) -> None:
        self.assigner, self.count = assigner, count

    def __call__(self, stages: Any, targets: Targets) -> list[Assignment]:
        size = stages[0].logits.shape[1] // self.count
        parts = []
        for index in range(self.count):
            rows = slice(index * size, (index + 1) * size)
            own = [replace(s, logits=s.logits[:, rows], boxes=s.boxes[:, rows]) for s in stages]
            found = [assignment.boxes for assignment in self.assigner(own, targets)]
            parts.append([replace(pairs, query=pairs.query + index * size) for pairs in found])
        together = [Pairs.cat(each) for each in zip(*parts, strict=True)]
        return [Assignment(pairs, pairs) for pairs in together]


@pytest.mark.parametrize("variant", LWDETR)
@scenes("lwdetr")
def test_lwdetr(name: str, variant: str) -> None:
    one = scene("lwdetr", name)
    count = int(one.number("groups"))
    divisor = "targets" if variant.endswith("_sum") else f"targets*{count}"
    loss = LossConfig(
        class_weight=1,
        log_epsilon=1e-8,
        class_divisor=divisor,
        l1_divisor=divisor,
        giou_divisor=divisor,
        **LWDETR[variant],
    )
    terms = loss.terms()
    if variant == "varifocal_mean":
        terms = (ZeroIsNegative(detach=False, divisor=Divisor.parse(divisor)), *terms[1:])
    elif variant == "position_mean":
        released = ZeroPositionIsNegative(1, power=1, divisor=Divisor.parse(divisor))
        terms = (released, *terms[1:])
    # the released code scales positions by the best pair of all groups of an image
    assigner = GroupByGroup(HungarianAssigner(default_costs(loss)), count)
    output = run(
        Criterion(terms, {"decoder": assigner}), [group("decoder", one.stages("group"))], one
    )
    check_stages(output, one, "decoder", "match.group")
    check_losses(output.losses, one, {**NAMES, "class": "loss_ce"}, prefix=f"{variant}.")
    check_total(output, one, prefix=f"{variant}.")


class OffsetByPairs(RankGiouClassLoss):
    """The released loss numbers an image's targets from the pairs, not the targets, before it."""

    def __call__(self, prediction: Any, targets: Any, assignment: Any, normalizers: Any) -> Tensor:
        pairs = assignment.classes
        counts = targets.image.bincount(minlength=targets.batch_size)
        matched = pairs.image.bincount(minlength=targets.batch_size)
        first, wrong = counts.cumsum(0) - counts, matched.cumsum(0) - matched
        moved = replace(pairs, target=pairs.target - (first - wrong)[pairs.image])
        overlap = paired_overlap(prediction, targets, moved, self.epsilon, generalized=True)
        scores = score_targets(prediction, targets, pairs, (overlap + 1) / 2)
        loss = score_gap_loss(prediction.logits, *scores, self.alpha, self.gamma)
        return loss.sum() / normalizers.of(self.divisor)


def overlap_of(stage: StagePrediction, targets: Targets, pairs: Pairs) -> Tensor:
    return paired_overlap(stage, targets, pairs, EPSILON, generalized=True)


@pytest.mark.parametrize("order", ["first_order", "high_order"])
@scenes("rankdetr")
def test_rankdetr(name: str, order: str) -> None:
    one = scene("rankdetr", name)
    loss = LossConfig(class_loss="rank_giou", **DETREX)
    class_loss, *box_losses = loss.terms()
    assert isinstance(class_loss, RankGiouClassLoss)
    if len(one.targets) > sum(min(n, one.inputs["logits"].shape[2]) for n in one.counts):
        class_loss = OffsetByPairs(epsilon=EPSILON, divisor=class_loss.divisor)
    high = (HighOrderCost(epsilon=EPSILON),)
    assigner = HungarianAssigner(default_costs(loss) if order == "first_order" else high)
    criterion = Criterion(
        (class_loss, *box_losses),
        {"decoder": assigner, "proposals": assigner},
        group_terms={"proposals": LossConfig(**DETREX).terms()},
    )
    groups = [
        group("decoder", one.stages()),
        group("proposals", [one.proposals()], class_agnostic=True),
    ]
    output = run(criterion, groups, one)
    check_stages(output, one, "decoder", f"{order}.match.decoder")
    check_pairs(
        output.assignments["proposals"][0].boxes,
        image_pairs(one, f"{order}.match.proposals"),
        one.targets,
    )
    if isinstance(class_loss, OffsetByPairs):
        assert name == "overfull"
    else:
        check_values(
            output,
            one,
            "decoder",
            one.stages(),
            lambda stage, pairs: (overlap_of(stage, one.targets, pairs) + 1) / 2,
            prefix=f"{order}.",
        )
    check_losses(output.losses, one, NAMES, prefix=f"{order}.")
    check_losses(output.losses, one, NAMES, "proposals", "_enc", prefix=f"{order}.")
    check_total(output, one, prefix=f"{order}.")


@scenes("detr")
def test_detr(name: str) -> None:
    one = scene("detr", name)
    num_classes = int(one.number("num_classes"))
    # "no object" has the last logit; only differences of logits matter to a softmax
    stages = [
        replace(stage, logits=stage.logits[..., :-1] - stage.logits[..., -1:])
        for stage in one.stages()
    ]
    one.targets = replace(one.targets, labels=one.targets.labels.clamp(max=num_classes - 1))
    loss = LossConfig(
        class_weight=1, class_loss="softmax", l1_divisor="targets", giou_divisor="targets"
    )
    costs = (SoftmaxClassCost(), L1BoxCost(), GIoUBoxCost())
    criterion = Criterion(loss.terms(), {"decoder": HungarianAssigner(costs)})
    output = run(criterion, [group("decoder", stages)], one)
    check_stages(output, one, "decoder", "match.decoder")
    check_losses(output.losses, one, {**NAMES, "class": "loss_ce"})
    check_total(output, one)


@scenes("tsp")
def test_tsp(name: str) -> None:
    one = scene("tsp", name)
    background = one.number("background_logit")
    term = SoftmaxClassLoss(easy_no_object=True, divisor_epsilon=1e-6)
    assigner = RestrictedAssigner(boxes="references")
    for index, (stage, twin) in enumerate(zip(one.stages(), one.stages("twin"), strict=True)):
        prediction = StagePrediction(stage.logits - background, stage.boxes, twin.boxes)
        output = run(
            Criterion([term], {"decoder": assigner}), [group("decoder", [prediction])], one
        )
        (assignment,) = output.assignments["decoder"]
        restricted = stage_pairs(one, "match.restricted", index)
        check_pairs(assignment.classes, restricted, one.targets)
        candidates = stage_pairs(one, "match.candidates", index)
        check_pairs(assignment.boxes, candidates, one.targets)
        if not len(one.targets):  # there the released loss vanishes; ours learns the background
            assert one.number(f"loss.loss_obj.{index}") == 0 < output.total.item()
            continue
        # the released run is in float32
        close(output.total, one.expected[f"loss.loss_obj.{index}"], 2e-6, "loss_obj")
        (grad,) = torch.autograd.grad(output.total, one.inputs["logits"])
        expected = one.expected[f"grad.logits.{index}"].double()
        assert (grad[index] - expected).abs().max() <= 2e-6 * expected.abs().max()
        check_two_stage_rules(one, index, prediction)


class Unguarded(IoUAssigner):
    """torchvision's rule: a target that nothing overlaps takes all that overlap it by 0."""

    def positives(self, score: Any) -> Any:
        return super().positives(score) | (score == score.max(1, keepdims=True)).any(0)


def check_two_stage_rules(one: Scene, index: int, prediction: StagePrediction) -> None:
    """Compare the owners of all queries under Faster R-CNN's two rules."""
    num_queries = prediction.logits.shape[1]
    first = torch.tensor(one.counts).cumsum(0) - torch.tensor(one.counts)
    best = torch.zeros(one.targets.batch_size, num_queries, dtype=torch.float64)
    overlap = overlap_table(replace(prediction, boxes=prediction.references), one.targets)
    for target, image in enumerate(one.targets.image.tolist()):
        best[image] = torch.maximum(best[image], overlap[target].detach())
    rules = {
        "faster_rcnn": IoUAssigner(0.5, None, 0, best_of_target=False, boxes="references"),
        "rpn": Unguarded(0.7, None, 0, boxes="references"),
    }
    for rule, assigner in rules.items():
        (assignment,) = assigner([prediction.detach()], one.targets)
        pairs = assignment.boxes
        owner = torch.full((one.targets.batch_size, num_queries), -1)
        if rule == "rpn":  # neither object nor background; nothing here ignores such queries
            owner[best >= 0.3] = -2
        owner[pairs.image, pairs.query] = pairs.target - first[pairs.image]
        for image in set(one.targets.image.tolist()):
            assert torch.equal(owner[image], one.expected[f"{rule}.match.{index}.{image}"]), rule
