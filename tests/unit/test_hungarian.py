"""The matcher's choice where several are equally good."""

from __future__ import annotations

import numpy as np
import pytest

from detrelay.assigners.hungarian import least_cost_pairs


@pytest.mark.parametrize(
    ("cost", "queries"),
    [  # [T, Q]; with targets as rows, scipy's solver would answer the other way round
        ([[1, 0], [1, 0]], [0, 1]),
        ([[1, 1], [0, 0]], [1, 0]),
        ([[0, 0, 0], [0, 1, 0], [0, 1, 0]], [1, 0, 2]),
    ],
)
def test_ties_are_settled_with_queries_as_rows(cost: list[list[int]], queries: list[int]) -> None:
    query, target = least_cost_pairs(np.array(cost, dtype=np.float32)).T
    assert target.tolist() == list(range(len(cost)))
    assert query.tolist() == queries
