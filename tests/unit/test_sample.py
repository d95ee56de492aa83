"""Messages about a dataset and about values in it."""

from __future__ import annotations

from detrelay.core.data.sample import DataReport, shown, some


def test_a_report_says_what_was_left_out() -> None:
    report = DataReport(
        images=3,
        boxes=5,
        images_without_boxes=1,
        crowd_boxes=2,
        dropped_boxes={"no visible part": 4},
        clipped_boxes=0,
        left_out_images=1,
        notes=("category 0 left out",),
    )
    assert report.summary() == (
        "3 images (1 without boxes), 5 boxes, 2 crowd boxes kept for evaluation only, "
        "4 boxes dropped: no visible part, 1 images without annotations left out; "
        "category 0 left out"
    )
    plain = DataReport(3, 5, 0, 0, {}, 0)
    assert plain.summary() == "3 images (0 without boxes), 5 boxes"


def test_long_lists_and_values_are_cut() -> None:
    assert some([1, 2, 3]) == "1, 2, 3"
    assert some(range(9), examples=2) == "0, 1, ..."
    assert shown("a" * 100) == "'" + "a" * 79 + "..."
    assert shown([1.5]) == "[1.5]"
    assert shown(10**5000) == "a int too large to show"
