"""Sizes of images after resizing and padding."""

from __future__ import annotations

import pytest

from detrelay.core.data.collate import padded_size
from detrelay.core.data.geometry import resized_shape


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut
        ((640, 480), 800, 1333, (1066, 800)),
        ((500, 500), 800, 1333, (800, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),  # round(399.9), then cut
        ((427, 1001), 800, 1333, (569, 1333)),  # round(568.6), 1333.88 is cut
        ((480, 640), 480, 1333, (480, 640)),
        ((480, 640), 800, None, (800, 1066)),
        ((1, 1000), 800, 100, (1, 100)),  # a sliver loses its aspect
        ((3000, 1), 800, 1333, (1333, 1)),
        ((1, 90), 1, 100, (1, 90)),
    ],
)
def test_resize_rule(
    size: tuple[int, int], short_side: int, max_size: int | None, expected: tuple[int, int]
) -> None:
    assert resized_shape(*size, short_side, max_size) == expected


def test_sizes_round_up_to_the_divisor() -> None:
    assert padded_size([(33, 64), (20, 65)], 32) == (64, 96)
    assert padded_size([(33, 64)], 1) == (33, 64)
    with pytest.raises(ValueError, match="at least 1 pixel, found 0"):
        padded_size([(33, 64)], 0)
