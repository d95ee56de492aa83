from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from detrelay.assigners import HungarianAssigner, build_assigners
from detrelay.core.criterion import Criterion
from detrelay.core.losses import FocalClassLoss, GIoUBoxLoss, L1BoxLoss, LossConfig
from detrelay.core.structures import (
    Assignment,
    Pairs,
    StageGroup,
    StagePrediction,
    Targets,
)
from factories import make_stages, make_targets


def fixed(*pairs: tuple[int, int, int]) -> Pairs:
    return Pairs(*(torch.tensor(column) for column in zip(*pairs, strict=True)))


class Fixed:
    """An assigner that always answers the same."""

    def __init__(self, classes: Pairs, boxes: Pairs) -> None:
        self.assignment = Assignment(classes, boxes)

    def __call__(self, stages: object, targets: object) -> list[Assignment]:
        return [self.assignment] * len(stages)  # type: ignore[arg-type]


def criterion(assigner: object = None, **weights: float) -> Criterion:
    return Criterion(LossConfig().terms(), {"decoder": assigner or HungarianAssigner()}, weights)


def one_query() -> tuple[StagePrediction, Targets]:
    """One image, two queries at probability 1/2, one object."""
    prediction = StagePrediction(
        logits=torch.zeros(1, 2, 3, requires_grad=True),
        boxes=torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]], requires_grad=True),
    )
    targets = Targets(
        torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.5, 0.25]]), torch.tensor([0]), 1
    )
    return prediction, targets


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


def test_l1_formats_differ_as_they_should() -> None:
    prediction, targets = one_query()
    targets = replace(targets, boxes=torch.tensor([[0.4, 0.5, 0.5, 0.5]]))
    pair = fixed((0, 0, 0))
    for box_format, expected in (("cxcywh", 0.1), ("xyxy", 0.2)):
        term = L1BoxLoss(box_format=box_format)  # type: ignore[arg-type]
        output = Criterion([term], {"decoder": Fixed(pair, pair)})(
            [StageGroup("decoder", (prediction,))], targets
        )
        assert output.losses["decoder/0/l1"].item() == pytest.approx(expected)


def test_focal_loss_equals_torchvision() -> None:
    from torchvision.ops import sigmoid_focal_loss as reference

    from detrelay.core.losses import sigmoid_focal_loss

    logits = torch.linspace(-6, 6, 40, dtype=torch.float64)
    wanted = (torch.arange(40) % 3 == 0).double()
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, wanted, alpha=0.3, gamma=1.5),
        reference(logits, wanted, alpha=0.3, gamma=1.5),
    )


def test_terms_carry_their_weights() -> None:
    terms = LossConfig(class_weight=3, l1_weight=4, giou_weight=5, alpha=0.5, gamma=1).terms()
    assert terms == (FocalClassLoss(3, 0.5, 1), L1BoxLoss(4), GIoUBoxLoss(5))


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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("class_weight", -1.0, "loss.class_weight must be a number from 0 on, found -1"),
        ("giou_weight", math.nan, "found nan"),
        ("l1_weight", math.inf, "found inf"),
        ("gamma", -2.0, "loss.gamma must be"),
        ("alpha", 1.5, "loss.alpha must be a share, 0 to 1, found 1.5"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LossConfig(), **{name: value})


def test_a_negative_weight_of_an_own_loss_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"loss\.extra_losses: the weight of a:B must be from 0 on"
    ):
        LossConfig(extra_losses=("a:B:-1",)).terms()


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
