"""Place the labels of boxes so that none covers another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

Rectangle = tuple[int, int, int, int]  # left, top, right, bottom, pixels

_ROWS = 4  # distance, in rows, up to which a label is moved before it may cover another


def place_labels(
    boxes: Sequence[tuple[float, float, float, float]],
    sizes: Sequence[tuple[int, int]],
    image: tuple[int, int],
) -> list[Rectangle]:
    """Find a place for each label.

    A label goes above its box, else inside at the top if it fits, else below, flush left and then
    flush right, else some rows further away: the first place inside the image that no earlier label
    takes. If all are taken, it goes where it covers the least.

    Args:
        boxes: xyxy, pixels; the earlier ones choose first.
        sizes: width and height of each label, pixels; a width of 0 needs no place.
        image: its width and height, pixels.
    """
    placed: list[Rectangle] = []
    for box, size in zip(boxes, sizes, strict=True):
        wishes = list(_places(box, size))
        whole = [place for place in wishes if place == _inside(place, image)]
        # a label that is cut off everywhere, such as a long one at the border, is moved
        candidates = whole + [_inside(place, image) for place in wishes if place not in whole]
        hidden = [sum(_shared(place, other) for other in placed) for place in candidates]
        placed.append(candidates[hidden.index(min(hidden))])
    return placed


def _places(box: tuple[float, float, float, float], size: tuple[int, int]) -> Iterator[Rectangle]:
    """All places for a label, the best first."""
    left, top, right, bottom = (round(side) for side in box)
    width, height = size
    fits = width <= right - left and height <= bottom - top
    # inside a small box it would cover the object
    rows = [top - height, top, bottom] if fits else [top - height, bottom, top]
    for row in range(1, _ROWS):
        rows += [top - (row + 1) * height, top + row * height, bottom + row * height]
    for near, column in itertools.product((rows[:3], rows[3:]), (left, right - width)):
        for row in near:
            yield column, row, column + width, row + height


def _inside(place: Rectangle, image: tuple[int, int]) -> Rectangle:
    """A place moved into the image, as far as it fits."""
    left = max(0, min(place[0], image[0] - (place[2] - place[0])))
    top = max(0, min(place[1], image[1] - (place[3] - place[1])))
    return left, top, left + place[2] - place[0], top + place[3] - place[1]


def _shared(one: Rectangle, other: Rectangle) -> int:
    """Pixels that two rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)
