"""Labels of boxes: placed so that none covers another."""

from __future__ import annotations

import itertools

import pytest

from detrelay.apps.labels import Rectangle, place_labels


def overlap(one: Rectangle, other: Rectangle) -> bool:
    return (
        min(one[2], other[2]) > max(one[0], other[0])
        and min(one[3], other[3]) > max(one[1], other[1])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((50, 60, 150, 160), (50, 48, 80, 60)),  # above
        ((50, 5, 150, 160), (50, 5, 80, 17)),  # no room above: inside
        ((190, 60, 199, 160), (169, 48, 199, 60)),  # no room to the right: flush right
        ((0, 0, 199, 199), (0, 0, 30, 12)),  # at the corner
        ((0, 0, 20, 10), (0, 10, 30, 22)),  # no room inside either: below
    ],
)
def test_a_label_goes_above_its_box_if_there_is_room(
    box: tuple[float, float, float, float], place: Rectangle
) -> None:
    assert place_labels([box], [(30, 12)], (200, 200)) == [place]


def test_labels_of_boxes_in_one_place_do_not_hide_each_other() -> None:
    box = (50.0, 60.0, 150.0, 160.0)
    places = place_labels([box] * 8, [(30, 12)] * 8, (200, 200))
    assert places[:3] == [(50, 48, 80, 60), (50, 60, 80, 72), (50, 160, 80, 172)]
    pairs = itertools.combinations(places, 2)
    assert not any(overlap(one, other) for one, other in pairs)
