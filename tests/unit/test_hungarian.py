"""The Hungarian matcher: least total cost, and the choice where several are equally good."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detrelay.assigners import ASSIGNERS, HungarianAssigner
from detrelay.assigners.hungarian import minimum_cost_pairs
from factories import as_set, make_stages, make_targets


@pytest.mark.parametrize(
    ("cost", "queries"),
    [  # [T, Q]; with targets as rows, scipy's solver would answer the other way round
        ([[1, 0], [1, 0]], [0, 1]),
        ([[1, 1], [0, 0]], [1, 0]),
        ([[0, 0, 0], [0, 1, 0], [0, 1, 0]], [1, 0, 2]),
    ],
)
def test_ties_are_settled_with_queries_as_rows(cost: list[list[int]], queries: list[int]) -> None:
    query, target = minimum_cost_pairs(np.array(cost, dtype=np.float32)).T
    assert target.tolist() == list(range(len(cost)))
    assert query.tolist() == queries


def test_matching_minimises_the_total_of_a_hand_made_cost() -> None:
    # queries 0, 1, 2 against two targets: greedy would take (0, 0) = 1 and then (1, 1) = 9
    table = torch.tensor([[1.0, 2.0, 5.0], [3.0, 9.0, 8.0]])
    assigner = HungarianAssigner([lambda _prediction, _targets: table])
    targets = make_targets((2,))
    (assignment,) = assigner(make_stages(stages=1, batch=1, queries=3), targets)
    assert as_set(assignment.boxes) == {(1, 0), (0, 1)}
    assert assignment.classes is assignment.boxes


def test_more_targets_than_queries_leave_some_unmatched() -> None:
    targets = make_targets((5, 1))
    (assignment,) = HungarianAssigner()(make_stages(stages=1, queries=3), targets)
    assert len(assignment.boxes) == 4
    assert (assignment.boxes.image == 0).sum() == 3
    for name in ASSIGNERS:
        for each in ASSIGNERS[name]()(make_stages(queries=3), targets):
            assert torch.equal(targets.image[each.classes.target], each.classes.image)
