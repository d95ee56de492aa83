"""Dynamic-k assignment by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detrelay.assigners.simota import SimOtaAssigner
from detrelay.core.structures import StagePrediction, Targets


def chosen(
    cost: list[list[float]],
    overlap: list[list[float]] | None = None,
    inside: list[list[float]] | None = None,
    near: list[list[float]] | None = None,
) -> list[list[int]]:
    """Pairs (query, target); without overlaps each target takes one query."""
    shape = np.array(cost)
    tables = [cost, overlap or 0 * shape, inside or 0 * shape + 1, near or 0 * shape + 1]
    pairs, _ = SimOtaAssigner().choose(np.stack([np.array(table) for table in tables]), 0, 0)
    return sorted(pairs.tolist())


def test_a_target_takes_as_many_queries_as_its_overlaps_add_up_to() -> None:
    overlap = [[0.9, 0.8, 0.5, 0.0], [0.1, 0.0, 0.3, 0.0]]  # 2.2 and 0.4
    cost = [[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 1.5, 9.0]]
    assert chosen(cost, overlap) == [[0, 0], [1, 0], [2, 1]]


def test_a_contested_query_stays_with_the_cheapest_target() -> None:
    overlap = [[0.9, 0.8, 0.5, 0.0], [0.1, 0.0, 0.3, 0.0]]
    cost = [[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 1.5, 9.0]]
    assert chosen(cost, overlap) == [[0, 0], [1, 1]]


def test_every_target_gets_a_query_while_queries_last() -> None:
    assert chosen([[1.0, 9.0], [2.0, 50.0]]) == [[0, 0], [1, 1]]
    assert chosen([[1.0], [2.0]]) == [[0, 0]]


def test_queries_outside_or_far_away_cost_more() -> None:
    cost = [[1.0, 2.0, 3.0]]
    assert chosen(cost, inside=[[0, 1, 1]]) == [[1, 0]]
    assert chosen(cost, inside=[[0, 0, 0]], near=[[0, 0, 1]]) == [[2, 0]]


def test_inside_is_within_the_box_and_near_within_the_radius() -> None:
    centers = torch.tensor([0.5, 0.59, 0.61, 0.69, 0.71])
    boxes = torch.stack([centers, torch.full((5,), 0.5), *torch.full((2, 5), 0.1)], dim=1)
    stage = StagePrediction(torch.zeros(1, 5, 1), boxes[None])
    box = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    targets = Targets(torch.tensor([0]), box, torch.tensor([0]), 1)
    _, _, inside, near = SimOtaAssigner(radius=1.0).tables(stage, targets)
    assert inside.tolist() == [[1, 1, 0, 0, 0]]
    assert near.tolist() == [[1, 1, 1, 1, 0]]


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="radius must be positive, found 0"):
        SimOtaAssigner(radius=0)
    with pytest.raises(ValueError, match="best_overlaps must be 1 or more, found 0"):
        SimOtaAssigner(best_overlaps=0)
