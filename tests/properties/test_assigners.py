"""What must hold for every assigner, over random predictions and targets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detrelay.assigners import ASSIGNERS, CrossStageAssigner, HungarianAssigner
from detrelay.core.structures import Pairs
from factories import make_stages, make_targets

counts = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 10_000)
every_assigner = pytest.mark.parametrize("name", list(ASSIGNERS))
one_to_one = pytest.mark.parametrize("name", ["hungarian", "cross_stage"])
# these settle ties by the order of the targets, and equal scores or votes do occur
by_order = ("one_to_many", "union", "simota")
any_order = pytest.mark.parametrize("name", [name for name in ASSIGNERS if name not in by_order])


def rows(pairs: Pairs) -> list[tuple[int, int, int]]:
    return sorted(
        zip(pairs.image.tolist(), pairs.query.tolist(), pairs.target.tolist(), strict=True)
    )


@every_assigner
@settings(max_examples=10, deadline=None)
@given(counts=counts, seed=seeds)
def test_pairs_stay_in_their_image_and_appear_once(
    name: str, counts: tuple[int, ...], seed: int
) -> None:
    targets = make_targets(counts, seed=seed)
    stages = make_stages(batch=len(counts), queries=8, seed=seed)
    for assignment in ASSIGNERS[name]()(stages, targets):
        for pairs in (assignment.boxes, assignment.classes):
            assert torch.equal(targets.image[pairs.target], pairs.image)
            assert len(set(rows(pairs))) == len(pairs)
            if len(pairs):
                assert 0 <= int(pairs.query.min()) <= int(pairs.query.max()) < 8


@one_to_one
@settings(max_examples=25, deadline=None)
@given(counts=counts, seed=seeds)
def test_boxes_are_one_to_one_and_in_their_image(
    name: str, counts: tuple[int, ...], seed: int
) -> None:
    targets = make_targets(counts, seed=seed)
    stages = make_stages(batch=len(counts), queries=8, seed=seed)
    for assignment in ASSIGNERS[name]()(stages, targets):
        boxes = assignment.boxes
        assert len(set(zip(boxes.image.tolist(), boxes.query.tolist(), strict=True))) == len(boxes)
        assert sorted(boxes.target.tolist()) == list(range(len(targets)))
        for pairs in (boxes, assignment.classes):
            assert torch.equal(targets.image[pairs.target], pairs.image)
            assert len(set(rows(pairs))) == len(pairs)


@any_order
@settings(max_examples=10, deadline=None)
@given(counts=counts, seed=seeds)
def test_order_of_targets_does_not_matter(name: str, counts: tuple[int, ...], seed: int) -> None:
    targets = make_targets(counts, seed=seed)
    stages = make_stages(batch=len(counts), seed=seed)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    shuffled = replace(
        targets,
        labels=targets.labels[order],
        boxes=targets.boxes[order],
        image=targets.image[order],
    )
    plain = ASSIGNERS[name]()(stages, targets)
    moved = ASSIGNERS[name]()(stages, shuffled)
    for a, b in zip(plain, moved, strict=True):
        for before, after in ((a.classes, b.classes), (a.boxes, b.boxes)):
            restored = Pairs(after.image, after.query, order[after.target])
            assert rows(before) == rows(restored)


@every_assigner
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_an_image_is_assigned_independently_of_its_batch(name: str, seed: int) -> None:
    targets = make_targets((3, 4), seed=seed)
    stages = make_stages(seed=seed)
    alone = replace(
        targets,
        labels=targets.labels[3:],
        boxes=targets.boxes[3:],
        image=targets.image[3:] - 1,
        batch_size=1,
    )
    only = [replace(s, logits=s.logits[1:], boxes=s.boxes[1:]) for s in stages]
    for a, b in zip(
        ASSIGNERS[name]()(stages, targets), ASSIGNERS[name]()(only, alone), strict=True
    ):
        second = a.classes.select(a.classes.image == 1)
        assert [(q, t - 3) for _, q, t in rows(second)] == [(q, t) for _, q, t in rows(b.classes)]


@settings(max_examples=25, deadline=None)
@given(counts=counts, seed=seeds)
def test_no_threshold_and_no_neighbours_is_hungarian(counts: tuple[int, ...], seed: int) -> None:
    targets = make_targets(counts, seed=seed)
    stages = make_stages(batch=len(counts), seed=seed)
    crossed = CrossStageAssigner(window=(0, 0), iou_threshold=0.0)(stages, targets)
    for a, b in zip(crossed, HungarianAssigner()(stages, targets), strict=True):
        assert rows(a.classes) == rows(b.classes)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, low=st.floats(0, 1), high=st.floats(0, 1))
def test_higher_threshold_keeps_a_subset(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    targets, stages = make_targets(seed=seed), make_stages(seed=seed)
    many = CrossStageAssigner(iou_threshold=low)(stages, targets)
    few = CrossStageAssigner(iou_threshold=high)(stages, targets)
    for a, b in zip(many, few, strict=True):
        assert set(rows(b.classes)) <= set(rows(a.classes))
