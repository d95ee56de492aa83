"""Assignment by overlap alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from detrelay.assigners.iou import IoUAssigner
from factories import as_set, make_stages, make_targets

# of two targets with four queries; the second is overlapped by less than the threshold
OVERLAP = np.array([[[0.9, 0.6, 0.2, 0.0], [0.1, 0.3, 0.5, 0.0]]])


def test_the_best_of_a_target_is_positive_below_the_threshold_too() -> None:
    guarded = IoUAssigner(at_most=None, max_positives=0)
    pairs = {tuple(pair) for pair in guarded.choose(OVERLAP, 0, 0)[1].tolist()}
    assert pairs == {(0, 0), (1, 0), (2, 1)}
    strict = IoUAssigner(at_most=None, max_positives=0, best_of_target=False)
    pairs = {tuple(pair) for pair in strict.choose(OVERLAP, 0, 0)[1].tolist()}
    assert pairs == {(0, 0), (1, 0)}


def test_a_target_that_nothing_overlaps_makes_no_query_positive() -> None:
    overlap = OVERLAP * np.array([1.0, 0.0])[:, None]
    assert IoUAssigner().positives(overlap[0]).tolist() == [True, True, False, False]


def test_boxes_of_the_start_decide_for_all_stages() -> None:
    stages, targets = make_stages(stages=2, batch=1), make_targets((3,))
    start = replace(stages[0], references=stages[1].boxes)
    assigner = IoUAssigner(threshold=0.1, max_positives=0, boxes="initial")
    found = assigner([start, stages[1]], targets)
    (expected,) = IoUAssigner(threshold=0.1, max_positives=0)(stages[1:], targets)
    (other,) = IoUAssigner(threshold=0.1, max_positives=0)(stages[:1], targets)
    assert [as_set(each.boxes) for each in found] == [as_set(expected.boxes)] * 2
    assert as_set(expected.boxes) != as_set(other.boxes)


def test_an_unknown_choice_of_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="boxes must be 'predicted' or 'references' or 'initial'"):
        IoUAssigner(boxes="first")  # type: ignore[arg-type]
