"""Weights of pairs by the rank of their alignment."""

from __future__ import annotations

import math

import pytest
import torch

from detrelay.assigners.rank_weighted import RankWeightedAssigner
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets


def test_the_best_aligned_pair_of_a_target_counts_most() -> None:
    # equal scores; the first three overlap the first target by 1/2, 1 and 3/4
    boxes = torch.tensor([[0.3, 0.5, w, 0.4] for w in (0.2, 0.4, 0.3)] + [[0.8, 0.5, 0.1, 0.4]])
    stage = StagePrediction(torch.zeros(1, 4, 1), boxes[None])
    targets = Targets(
        torch.tensor([0, 0]),
        torch.tensor([[0.3, 0.5, 0.4, 0.4], [0.8, 0.5, 0.3, 0.4]]),
        torch.tensor([0, 0]),
        1,
    )
    pairs = Pairs(torch.zeros(4, dtype=torch.int64), torch.arange(4), torch.tensor([0, 0, 0, 1]))
    base = [Assignment(classes=pairs, boxes=pairs)]
    (found,) = RankWeightedAssigner(lambda *_: base)([stage], targets)
    expected = torch.tensor([math.exp(-2 / 1.5), 1.0, math.exp(-1 / 1.5), 1.0])
    assert found.boxes.weight is not None
    torch.testing.assert_close(found.boxes.weight, expected)
    assert found.classes is found.boxes
    # separate class pairs are ranked separately
    base = [Assignment(classes=pairs.select(torch.tensor([0, 2])), boxes=pairs)]
    (found,) = RankWeightedAssigner(lambda *_: base)([stage], targets)
    assert found.classes.weight is not None
    torch.testing.assert_close(found.classes.weight, torch.tensor([math.exp(-1 / 1.5), 1.0]))


def test_weights_that_cannot_fall_are_refused() -> None:
    with pytest.raises(ValueError, match="tau must be positive, found 0"):
        RankWeightedAssigner(tau=0)
