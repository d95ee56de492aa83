"""Places of queries: planted facts, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detrelay.core.evaluation.cascade import Cascade, Labels
from detrelay.core.evaluation.query_places import busiest_queries, specialisation


def cascade_of(boxes: Any, own: tuple[Labels, ...]) -> Cascade:
    """Boxes [S, 2, Q, 4] in two images of 400 x 400 pixels, three objects."""
    return Cascade(
        image=np.array([0, 0, 1]),
        category=np.zeros(3, dtype=np.int64),
        target_boxes=np.ones((3, 4)),
        image_sizes=np.full((2, 2), 400.0),
        boxes=np.array(boxes, dtype=np.float32),
        own=own,
        learned=own,
    )


def test_specialisation_is_what_the_query_explains_of_its_boxes() -> None:
    """Two images of 400 x 400 pixels, two queries: centres as planted."""

    def boxes(*centres: tuple[float, float], side: float = 40) -> list[list[float]]:
        return [[400 * x - side / 2, 400 * y - side / 2, side, side] for x, y in centres]

    planted = [
        [boxes((0.2, 0.5), (0.8, 0.5)), boxes((0.2, 0.5), (0.8, 0.5))],  # each has its place
        [boxes((0.2, 0.5), (0.8, 0.5)), boxes((0.8, 0.5), (0.2, 0.5))],  # they change places
        # query 0 at y 0.1 and 0.3, query 1 at y 0.5 and 0.7: between 0.04, within 0.01
        [boxes((0.5, 0.1), (0.5, 0.5), side=20), boxes((0.5, 0.3), (0.5, 0.7))],
    ]
    found = specialisation(cascade_of(planted, ()))
    assert [entry.place for entry in found] == pytest.approx([1.0, 0.0, 0.8], abs=1e-6)
    assert [entry.size for entry in found] == [None, None, pytest.approx(0, abs=1e-9)]


def test_busiest_queries_come_first_with_their_boxes() -> None:
    boxes = np.tile(np.array([300, 300, 10, 10], dtype=np.float32), (1, 2, 4, 1))
    boxes[0, 0, 3] = [0, 0, 20, 20]
    matched = Labels(np.array([0, 2, 1]), np.array([3, 3, 1]))
    busy = cascade_of(boxes, (matched,))
    first, second = busiest_queries(busy, 2, 10)
    assert (first.query, first.objects, second.query, second.objects) == (3, 2, 1, 1)
    # [0, 0, 20, 20] in image 0, [300, 300, 10, 10] in image 1, of 400 x 400 pixels
    expected = np.array([[0.025, 0.025, 0.05, 0.05], [0.7625, 0.7625, 0.025, 0.025]])
    np.testing.assert_allclose(first.boxes, expected, atol=1e-7)
    assert len(busiest_queries(busy, 1, 1)[0].boxes) == 1
