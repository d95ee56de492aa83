"""Divisors, weights of pairs, losses by group, groups that share slots, rows that move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from detrelay.assigners import HungarianAssigner
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.criterion import Criterion
from detrelay.core.loss_terms import Divisor, Normalizers, score_targets
from detrelay.core.losses import FocalClassLoss, GIoUBoxLoss, L1BoxLoss, LossConfig
from detrelay.core.structures import Assignment, Pairs, StageGroup, StagePrediction, Targets
from factories import make_stages, make_targets


def fixed(*pairs: tuple[int, int, int], weight: Sequence[float] | None = None) -> Pairs:
    columns = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return Pairs(*columns, None if weight is None else torch.tensor(weight))


class Fixed:
    """Always the same pairs; remembers what it saw."""

    def __init__(self, classes: Pairs, boxes: Pairs) -> None:
        self.assignment = Assignment(classes, boxes)
        self.seen: list[StagePrediction] = []

    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        self.seen = list(stages)
        return [self.assignment] * len(stages)


def test_divisors_by_hand() -> None:
    numbers = [torch.tensor(value) for value in (7.0, 5.0, 3.0, 0.25)]
    normalizers = Normalizers(*numbers, num_processes=2)
    expected = {"targets": 1.5, "pairs": 2.5, "larger": 3.5, "targets*6": 9.0, "pairs*0.1": 0.5}
    for text, value in expected.items():
        assert normalizers.of(Divisor.parse(text)).item() == value, text
    assert normalizers.of(Divisor("own")).item() == 0.125
    assert (normalizers.classes.item(), normalizers.boxes.item()) == (3.5, 2.5)


@pytest.mark.parametrize("text", ["own", "target", "pairs*", "pairs*0", "pairs*-1", "targets*inf"])
def test_bad_divisors_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a divisor must be targets, pairs, larger"):
        Divisor.parse(text)


def test_each_term_is_divided_as_it_says() -> None:
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


def test_weights_scale_box_losses_and_wanted_scores() -> None:
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


def test_weights_stay_with_their_pairs() -> None:
    pairs = fixed((0, 0, 0), (0, 1, 1), weight=[0.25, 0.5])
    assert pairs.select(torch.tensor([1])).weight == torch.tensor([0.5])
    together = Pairs.cat([fixed((1, 0, 2)), pairs])
    assert together.weight is not None
    assert together.weight.tolist() == [1, 0.25, 0.5]
    assert Pairs.cat([fixed((1, 0, 2)), fixed((1, 1, 2))]).weight is None


def test_of_several_scores_for_one_class_the_highest_holds() -> None:
    prediction = make_stages(stages=1, batch=1, queries=2, classes=3)[0]
    targets = Targets(torch.tensor([1, 1]), torch.rand(2, 4), torch.tensor([0, 0]), 1)
    pairs = fixed((0, 1, 0), (0, 1, 1), (0, 0, 0))
    wanted, positive = score_targets(prediction, targets, pairs, torch.tensor([0.7, 0.2, 0.0]))
    assert wanted[0].tolist() == [[0, 0, 0], [0, pytest.approx(0.7), 0]]
    assert positive[0].tolist() == [[False, True, False], [False, True, False]]


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
