"""One class pair among the queries whose box fits."""

from __future__ import annotations

import numpy as np
import pytest

from detrelay.assigners.restricted import RestrictedAssigner


def test_the_cheapest_candidate_learns_the_class_and_all_candidates_the_box() -> None:
    overlap = [[0.6, 0.7, 0.2, 0.9], [0.1, 0.8, 0.3, 0.0], [0.4, 0.0, 0.4, 0.0]]
    # the first target's minimum cost is that of a query that overlaps another one more
    cost = [[5.0, 1.0, 0.0, 2.0], [1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    classes, boxes = RestrictedAssigner().choose(np.array([overlap, cost]), 0, 0)
    assert sorted(boxes.tolist()) == [[0, 0], [1, 1], [3, 0]]
    assert classes.tolist() == [[3, 0], [1, 1]]


def test_the_threshold_is_inclusive() -> None:
    tables = np.array([[[0.5]], [[1.0]]])
    assert RestrictedAssigner(threshold=0.5).choose(tables, 0, 0)[1].tolist() == [[0, 0]]
    assert RestrictedAssigner(threshold=0.51).choose(tables, 0, 0)[1].tolist() == []


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\], found 0"):
        RestrictedAssigner(threshold=0)
