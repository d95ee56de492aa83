"""The criterion: losses by hand, groups, divisors, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from detrelay.assigners import HungarianAssigner, build_assigners
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.criterion import Criterion
from detrelay.core.loss_terms import Divisor
from detrelay.core.losses import FocalClassLoss, GIoUBoxLoss, L1BoxLoss, LossConfig
from detrelay.core.structures import (
    Assignment,
    Pairs,
    StageGroup,
    StagePrediction,
    Targets,
)
from factories import Fixed, fixed, make_stages, make_targets, one_query


def criterion(assigner: object = None, **weights: float) -> Criterion:
    return Criterion(LossConfig().terms(), {"decoder": assigner or HungarianAssigner()}, weights)


def test_hand_computed_losses() -> None:
    prediction, targets = one_query()
    pair = fixed((0, 0, 0))
    output = criterion(Fixed(pair, pair))([StageGroup("decoder", (prediction,))], targets)
    # p = 1/2: a positive gives 0.25 * 0.25 * ln 2, a negative 0.75 * 0.25 * ln 2
    expected = (0.25 + 5 * 0.75) * 0.25 * math.log(2)
    assert output.losses["decoder/0/class"].item() == pytest.approx(expected)
    assert output.losses["decoder/0/l1"].item() == pytest.approx(0.25)
    assert output.losses["decoder/0/giou"].item() == pytest.approx(0.5)
    total = 2 * expected + 5 * 0.25 + 2 * 0.5
    assert output.total.item() == pytest.approx(total)


def test_classes_and_boxes_have_their_own_pairs_and_divisors() -> None:
    prediction, targets = one_query()
    both = fixed((0, 0, 0), (0, 1, 0))
    output = criterion(Fixed(both, fixed((0, 0, 0))))(
        [StageGroup("decoder", (prediction,))], targets
    )
    # two positives share a divisor of two; the boxes keep one pair
    positives, negatives = 2 * 0.25, 4 * 0.75
    expected = (positives + negatives) * 0.25 * math.log(2) / 2
    assert output.losses["decoder/0/class"].item() == pytest.approx(expected)
    assert output.losses["decoder/0/l1"].item() == pytest.approx(0.25)


def test_two_targets_of_one_class_count_once() -> None:
    prediction, targets = one_query()
    twice = Targets(
        targets.labels.repeat(2), targets.boxes.repeat(2, 1), targets.image.repeat(2), 1
    )
    pairs = fixed((0, 0, 0), (0, 0, 1))
    once = criterion(Fixed(fixed((0, 0, 0)), fixed((0, 0, 0))))(
        [StageGroup("decoder", (prediction,))], targets
    )
    merged = criterion(Fixed(pairs, fixed((0, 0, 0))))(
        [StageGroup("decoder", (prediction,))], twice
    )
    assert merged.losses["decoder/0/class"] == once.losses["decoder/0/class"]


def test_keys_name_group_stage_and_term() -> None:
    stages = tuple(make_stages(stages=2))
    known = fixed((0, 0, 0))
    groups = [
        StageGroup("decoder", stages),
        StageGroup("denoising", stages[:1], known_pairs=known),
    ]
    output = criterion()(groups, make_targets())
    assert list(output.losses) == [
        *(f"decoder/{stage}/{term}" for stage in (0, 1) for term in ("class", "l1", "giou")),
        *(f"denoising/0/{term}" for term in ("class", "l1", "giou")),
    ]
    assert output.assignments["denoising"][0].boxes is known


def test_group_weights_scale_the_total_only() -> None:
    groups = [StageGroup("decoder", tuple(make_stages()))]
    plain = criterion()(groups, make_targets())
    halved = criterion(decoder=0.5)(groups, make_targets())
    assert halved.losses == plain.losses
    assert halved.total.item() == pytest.approx(plain.total.item() / 2)


def test_class_agnostic_groups_learn_class_zero() -> None:
    targets = make_targets()
    stages = tuple(
        StagePrediction(stage.logits[..., :1], stage.boxes) for stage in make_stages(stages=1)
    )
    output = Criterion(LossConfig().terms(), {"proposals": HungarianAssigner()})(
        [StageGroup("proposals", stages, class_agnostic=True)], targets
    )
    assert torch.isfinite(output.total)


@pytest.mark.parametrize("assigner", ["hungarian", "cross_stage"])
def test_batch_without_objects_has_finite_losses_and_gradients(assigner: str) -> None:
    stages = make_stages()
    for stage in stages:
        stage.logits.requires_grad_()
        stage.boxes.requires_grad_()
    targets = make_targets((0, 0))
    output = Criterion(LossConfig().terms(), build_assigners(assigner, LossConfig()))(
        [StageGroup("decoder", tuple(stages))], targets
    )
    output.total.backward()
    assert torch.isfinite(output.total)
    for stage in stages:
        assert stage.boxes.grad is not None
        assert stage.boxes.grad.abs().sum() == 0
        assert stage.logits.grad is not None
        assert stage.logits.grad.abs().sum() > 0


def test_inputs_are_not_changed() -> None:
    stages, targets = make_stages(), make_targets()
    before = [stage.logits.clone() for stage in stages], targets.boxes.clone()
    criterion()([StageGroup("decoder", tuple(stages))], targets)
    assert all(torch.equal(a, b.logits) for a, b in zip(before[0], stages, strict=True))
    assert torch.equal(before[1], targets.boxes)


@pytest.mark.parametrize("image_ids", [[55, 77], torch.tensor([55, 77])])
def test_non_finite_loss_names_stage_and_images(image_ids: Any) -> None:
    stages = make_stages()
    logits = stages[1].logits.clone()
    logits[1, 3] = torch.nan
    known = fixed((0, 0, 0))
    stages[1] = replace(stages[1], logits=logits)
    group = StageGroup("denoising", tuple(stages), known_pairs=known)
    with pytest.raises(FloatingPointError, match=r"denoising/1.*image ids: \[77\]"):
        criterion()([group], make_targets(), image_ids=image_ids)


def test_non_finite_cost_names_stage_and_image() -> None:
    stages = make_stages()
    boxes = stages[2].boxes.clone()
    boxes[1] = torch.inf
    stages[2] = replace(stages[2], boxes=boxes)
    with pytest.raises(FloatingPointError, match=r"stage 2; images of the batch: \[1\]"):
        criterion()([StageGroup("decoder", tuple(stages))], make_targets())


def test_label_outside_the_classes_is_refused() -> None:
    targets = replace(make_targets(), labels=torch.tensor([0, 1, 2, 3, 9]))
    with pytest.raises(
        ValueError,
        match="class label 9 found in image 1 of the batch, but the model scores 4 classes",
    ):
        criterion()([StageGroup("decoder", tuple(make_stages()))], targets)


def test_groups_without_assigner_are_refused_all_at_once() -> None:
    groups = [StageGroup(name, tuple(make_stages())) for name in ("decoder", "hybrid", "group/1")]
    message = (
        "no assigner for stage groups hybrid, group/1; assigners are given for decoder. Set "
        "groups.hybrid.assigner.name in the recipe or, where a model is called with labels, its "
        "loss_function to a Criterion"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        criterion()(groups, make_targets())


class MostVotedBoxes:
    """Design test: box pairs united over stages (D-FINE's idea) need no change to the criterion."""

    def __call__(self, stages: list[StagePrediction], targets: Targets) -> list[Assignment]:
        own = HungarianAssigner()(stages, targets)
        union = Pairs.cat([assignment.boxes for assignment in own])
        return [Assignment(assignment.classes, union) for assignment in own]


def test_criterion_takes_an_assigner_that_unites_boxes() -> None:
    output = criterion(MostVotedBoxes())(
        [StageGroup("decoder", tuple(make_stages()))], make_targets()
    )
    assert len(output.assignments["decoder"][0].boxes) == 15
    assert torch.isfinite(output.total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_taken_in_float32(dtype: torch.dtype) -> None:
    stages, targets = make_stages(stages=2), make_targets()
    half = [
        StagePrediction(stage.logits.to(dtype), stage.boxes.to(dtype).requires_grad_())
        for stage in stages
    ]
    found = criterion()([StageGroup("decoder", tuple(half))], targets)
    full = [StagePrediction(stage.logits.float(), stage.boxes.float()) for stage in half]
    expected = criterion()([StageGroup("decoder", tuple(full))], targets)
    assert found.total.dtype == torch.float32
    for key, loss in expected.losses.items():
        assert found.losses[key].dtype == torch.float32, key
        assert torch.equal(found.losses[key], loss), key
    found.total.backward()
    assert all(stage.boxes.grad is not None and stage.boxes.grad.dtype == dtype for stage in half)


def test_each_term_is_divided_by_its_divisor() -> None:
    stages, targets = make_stages(stages=1), make_targets((3, 2))
    pairs = fixed((0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 3))
    assigner = Fixed(pairs, pairs.select(torch.tensor([0, 2])))

    def losses(loss: LossConfig) -> dict[str, torch.Tensor]:
        group = StageGroup("decoder", tuple(stages))
        return Criterion(loss.terms(), {"decoder": assigner})([group], targets).losses

    plain = losses(LossConfig())  # 4 class entries, 2 box pairs, 5 objects
    other = losses(LossConfig(class_divisor="targets", l1_divisor="larger", giou_divisor="pairs*3"))
    for term, factor in (("class", 4 / 5), ("l1", 2 / 4), ("giou", 1 / 3)):
        key = f"decoder/0/{term}"
        assert other[key].item() == pytest.approx(plain[key].item() * factor)


def test_known_pairs_count_as_objects() -> None:
    stages, targets = make_stages(stages=1), make_targets((3, 2))
    known = fixed((0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 1), (1, 0, 3), (1, 1, 4), (1, 2, 4))
    group = StageGroup("denoising", tuple(stages), known_pairs=known)
    plan = Criterion(LossConfig().terms(), {}).plan([group], targets)
    assert plan.counts.tolist() == [[7, 7, 7, 0]]


def test_weights_scale_box_losses_and_target_scores() -> None:
    stages, targets = make_stages(stages=1), make_targets((3, 2))
    pairs = fixed((0, 0, 0), (1, 2, 3))
    weighed = replace(pairs, weight=torch.tensor([0.5, 1.0]))
    first = pairs.select(torch.tensor([0]))
    for term in (L1BoxLoss(divisor=Divisor("targets")), GIoUBoxLoss(divisor=Divisor("targets"))):

        def loss(boxes: Pairs, term: object = term) -> float:
            criterion = Criterion([term], {"decoder": Fixed(pairs, boxes)})  # type: ignore[list-item]
            return criterion([StageGroup("decoder", tuple(stages))], targets).total.item()

        assert loss(weighed) == pytest.approx(loss(pairs) - 0.5 * loss(first))
    # a focal loss whose positive aims at 1/2 is at its least there
    logits = torch.tensor([[[0.0]]], requires_grad=True)
    one = Targets(torch.tensor([0]), torch.ones(1, 4), torch.tensor([0]), 1)
    prediction = StagePrediction(logits, torch.ones(1, 1, 4))
    half = Fixed(fixed((0, 0, 0), weight=[0.5]), fixed((0, 0, 0)))
    Criterion([FocalClassLoss()], {"decoder": half})(
        [StageGroup("decoder", (prediction,))], one
    ).total.backward()
    assert logits.grad is not None
    assert logits.grad.item() == 0


def test_a_group_may_have_losses_of_its_own() -> None:
    stages, targets = tuple(make_stages(stages=1)), make_targets()
    groups = [StageGroup("decoder", stages), StageGroup("hybrid", stages)]
    criterion = Criterion(
        LossConfig().terms(),
        {"decoder": HungarianAssigner(), "hybrid": HungarianAssigner()},
        {"hybrid": 0.5},
        group_terms={"hybrid": [FocalClassLoss(weight=3)]},
    )
    output = criterion(groups, targets)
    assert [key for key in output.losses if key.startswith("hybrid")] == ["hybrid/0/class"]
    losses = output.losses
    own = 2 * losses["decoder/0/class"] + 5 * losses["decoder/0/l1"] + 2 * losses["decoder/0/giou"]
    expected = own + 0.5 * 3 * losses["hybrid/0/class"]
    assert output.total.item() == pytest.approx(expected.item())


def test_joining_groups_are_assigned_together_and_come_first() -> None:
    stages, targets = make_stages(stages=3), make_targets()
    assigner = Fixed(fixed((0, 0, 0)), fixed((0, 1, 1)))
    groups = [
        StageGroup("decoder", tuple(stages[:2])),
        StageGroup("proposals", (stages[2],), slots="decoder"),
    ]
    criterion = Criterion(
        LossConfig().terms(), {"decoder": assigner}, joins={"proposals": "decoder"}
    )
    output = criterion(groups, targets)
    for seen, index in zip(assigner.seen, (2, 0, 1), strict=True):
        assert torch.equal(seen.boxes, stages[index].boxes)
    assert [len(output.assignments[name]) for name in ("decoder", "proposals")] == [2, 1]
    with pytest.raises(ValueError, match="'proposals' cannot join 'decoder': they share no slots"):
        criterion([groups[0], replace(groups[1], slots=None)], targets)


def test_an_assigner_sees_slots_and_losses_see_rows() -> None:
    stages, targets = make_stages(stages=2), make_targets()
    plain = Criterion(LossConfig().terms(), {"decoder": HungarianAssigner()})
    expected = plain([StageGroup("decoder", tuple(stages))], targets)
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(8, generator=generator) for _ in range(2)])
    rows = torch.arange(2)[:, None]
    moved = StagePrediction(stages[1].logits[rows, order], stages[1].boxes[rows, order], slot=order)
    watch = Fixed(fixed((0, 0, 0)), fixed((0, 0, 0)))
    Criterion(LossConfig().terms(), {"decoder": watch})([StageGroup("decoder", (moved,))], targets)
    assert torch.equal(watch.seen[0].boxes, stages[1].boxes)
    found = plain([StageGroup("decoder", (stages[0], moved))], targets)
    for key, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[key], loss)
    pairs, own = (o.assignments["decoder"][1].boxes for o in (found, expected))
    assert torch.equal(order[pairs.image, pairs.query], own.query)


def test_an_assigner_must_answer_for_every_stage() -> None:
    def short(stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        return HungarianAssigner()(stages[:1], targets)

    with pytest.raises(ValueError, match="one assignment for each of 3 stages, found 1"):
        Criterion(LossConfig().terms(), {"decoder": short})(
            [StageGroup("decoder", tuple(make_stages()))], make_targets()
        )


@pytest.mark.parametrize("loss", list(CLASS_LOSSES))
def test_batches_that_share_counts_are_one_large_batch(loss: str) -> None:
    divisor = None if loss == "softmax" else "targets*2"
    terms = LossConfig(class_loss=loss, class_divisor=divisor, giou_divisor="larger").terms()
    criterion = Criterion(terms, {"decoder": HungarianAssigner()})
    (stage,), targets = make_stages(stages=1), make_targets((3, 2))
    whole = criterion([StageGroup("decoder", (stage,))], targets)
    plans = []
    for image in range(2):
        part = StagePrediction(stage.logits[image, None], stage.boxes[image, None])
        own = targets.image == image
        some = Targets(targets.labels[own], targets.boxes[own], 0 * targets.image[own], 1)
        plans.append(criterion.plan([StageGroup("decoder", (part,))], some))
    counts = torch.stack([plan.counts for plan in plans]).sum(0)
    parts = [criterion.losses(plan, counts) for plan in plans]
    for key, value in whole.losses.items():
        torch.testing.assert_close(parts[0].losses[key] + parts[1].losses[key], value)
