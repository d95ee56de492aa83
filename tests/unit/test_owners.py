"""Votes of positive queries for the target that they suit best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners.owners import OwnerAssigner, last_of_query
from detrelay.core.structures import StagePrediction, Targets


class ByThreshold(OwnerAssigner):
    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        raise NotImplementedError

    def positives(self, score: NDArray[Any]) -> NDArray[np.bool_]:
        positive: NDArray[np.bool_] = score.max(0) >= self.threshold
        return positive


def chosen(
    score: list[list[float]],
    at_most: int | None = 2,
    max_positives: int | None = 0,
    one_class: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """Class pairs and box pairs (query, target), sorted."""
    assigner = ByThreshold(0.5, at_most, max_positives, one_class)
    classes, boxes = assigner.choose(np.array([score]), 0, 0)
    return sorted(classes.tolist()), sorted(boxes.tolist())


def test_a_target_takes_as_many_queries_as_vote_for_it_and_no_more_than_allowed() -> None:
    score = [[0.9, 0.7, 0.8, 0.1], [0.2, 0.1, 0.3, 0.6]]
    assert chosen(score)[1] == [[0, 0], [2, 0], [3, 1]]
    assert chosen(score, at_most=None)[1] == [[0, 0], [1, 0], [2, 0], [3, 1]]


def test_a_target_without_votes_gets_no_query() -> None:
    assert chosen([[0.9, 0.6], [0.8, 0.1]])[1] == [[0, 0], [1, 0]]


def test_one_class_makes_a_query_of_two_targets_learn_only_the_better_one() -> None:
    score = [[0.9, 0.0, 0.0], [0.8, 0.7, 0.0]]
    both = [[0, 0], [0, 1]]
    assert chosen(score) == (both, both)
    assert chosen(score, one_class=True) == ([[0, 0]], both)


def test_the_best_positives_stay_where_they_are_limited() -> None:
    score = [[0.6, 0.9, 0.7, 0.1]]
    assert chosen(score, at_most=None, max_positives=2)[1] == [[1, 0], [2, 0]]
    assert chosen(score, at_most=None, max_positives=None)[1] == [[1, 0]]  # a quarter of four


def test_of_a_query_the_last_pair_stays() -> None:
    pairs = np.array([[0, 1], [2, 0], [0, 3]])
    assert last_of_query(pairs).tolist() == [[2, 0], [0, 3]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.5, 2, 0), r"threshold must lie in \[0, 1\], found 1.5"),
        ((0.5, 0, 0), "at_most must be 1 or more, found 0"),
        ((0.5, 2, -1), "max_positives must be 0 or more, found -1"),
    ],
)
def test_numbers_out_of_range_are_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByThreshold(*values, False)
