"""Additional query sets of a decoder in training."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from detrelay.core.structures import GroupFacts
from detrelay.heads.query_sets import QuerySetsConfig


def config(**values: Any) -> QuerySetsConfig:
    return QuerySetsConfig(num_queries=10, **values)


def test_sets_are_named_with_their_numbers_of_queries() -> None:
    assert config().hidden_sets == {}
    sets = config(hybrid_queries=4, query_groups=3).hidden_sets
    assert list(sets.items()) == [("hybrid", 4), ("group/1", 10), ("group/2", 10)]


def test_recollected_queries_are_the_decoders() -> None:
    assert config().pass_groups == ()
    groups = config(hybrid_queries=4, recollect_queries=True).pass_groups
    assert groups == (GroupFacts("hybrid"), GroupFacts("recollected", slots="decoder"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hybrid_queries": -1}, "hybrid_queries must be >= 0; found -1"),
        ({"query_groups": 0}, "query_groups must be at least 1; found 0"),
    ],
)
def test_impossible_numbers_of_queries_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        config(**values)
