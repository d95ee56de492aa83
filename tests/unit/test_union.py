"""Box pairs that all stages share."""

from __future__ import annotations

import torch

from detrelay.assigners.union import UnionAssigner, most_voted
from detrelay.core.structures import Assignment, Pairs
from factories import make_stages, make_targets


def pairs(*rows: tuple[int, int, int]) -> Pairs:
    """Pairs of image, query and target."""
    return Pairs(*torch.tensor(rows).reshape(-1, 3).T)


def rows(found: Pairs) -> list[tuple[int, ...]]:
    return sorted(
        zip(found.image.tolist(), found.query.tolist(), found.target.tolist(), strict=True)
    )


def test_a_query_keeps_the_target_of_most_stages_and_the_first_of_ties() -> None:
    parts = [
        pairs((0, 0, 1), (0, 1, 0), (1, 0, 2)),
        pairs((0, 0, 1), (0, 1, 1)),
        pairs((0, 0, 0)),
    ]
    assert rows(most_voted(parts, num_queries=3, num_targets=3)) == [
        (0, 0, 1),
        (0, 1, 0),
        (1, 0, 2),
    ]
    assert rows(most_voted([pairs()], num_queries=3, num_targets=0)) == []


def test_stages_share_their_boxes_and_keep_their_classes() -> None:
    own = [Assignment(each, each) for each in (pairs((0, 0, 0)), pairs((0, 2, 0), (1, 1, 1)))]
    found = UnionAssigner(lambda *_: own)(make_stages(stages=2), make_targets((1, 1)))
    assert [each.classes for each in found] == [each.classes for each in own]
    assert found[0].boxes is found[1].boxes
    assert rows(found[0].boxes) == [(0, 0, 0), (0, 2, 0), (1, 1, 1)]
