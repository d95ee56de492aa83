"""Matching with every target several times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detrelay.assigners.repeated import RepeatedAssigner
from factories import make_stages, make_targets

COST = np.array([[[1.0, 2.0, 9.0, 9.0], [9.0, 9.0, 1.0, 2.0]]])


def chosen(stage: int = 0, **options: Any) -> list[list[int]]:
    """Pairs (query, target)."""
    pairs, _ = RepeatedAssigner(**options).choose(COST, stage, 0)
    return sorted(pairs.tolist())


def test_every_target_gets_k_queries_at_minimum_cost() -> None:
    assert chosen(times=1) == [[0, 0], [2, 1]]
    assert chosen(times=2) == [[0, 0], [1, 0], [2, 1], [3, 1]]


def test_too_few_queries_all_get_a_target() -> None:
    assert [query for query, _ in chosen(times=3)] == [0, 1, 2, 3]


def test_a_share_of_the_queries_limits_k_but_not_below_one() -> None:
    assert chosen(times=2, max_share=0.5) == [[0, 0], [2, 1]]
    assert chosen(times=2, max_share=0.1) == [[0, 0], [2, 1]]


def test_each_stage_may_have_its_own_k() -> None:
    assert len(chosen(stage=0, times=(1, 2))) == 2
    assert len(chosen(stage=1, times=(1, 2))) == 4
    with pytest.raises(ValueError, match="times has 2 values for 3 stages"):
        RepeatedAssigner((1, 2))(make_stages(stages=3), make_targets())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": 0}, "times must be 1 or more, found 0"),
        ({"times": ()}, "times must be 1 or more"),
        ({"max_share": 0}, r"max_share must lie in \(0, 1\], found 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepeatedAssigner(**options)
