"""Kinds of errors, and how much AP would gain if all errors of a kind were fixed.

Reference:
    Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020,
    section 2; figures checked against tidecv 1.0.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from detrelay.core.evaluation.matching import claim
from detrelay.core.evaluation.tables import Bools, Floats, Found, GroundTruth, Ints, box_iou

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
MEANINGS = {
    "classification": "overlaps an object of another category well",
    "localization": "overlaps an object of its category, but not well enough",
    "both": "overlaps an object of another category, and not well enough",
    "duplicate": "overlaps an object well that a better detection has found",
    "background": "overlaps no object",
    "missed": "an object that no wrong detection would have found if fixed",
}
_CLASS, _PLACE, _BOTH, _DUPLICATE, _BACKGROUND, _ = range(len(KINDS))
_RIGHT = -1
_RECALLS = np.array([step / 100 for step in range(101)])


@dataclass(frozen=True, slots=True)
class ErrorBreakdown:
    """Errors of a detector at one IoU threshold.

    Attributes:
        ap: AP as a fraction at the threshold, over categories with an object or a detection.
        counts: number of errors by kind.
        gains: AP, as a fraction, gained if all errors of one kind were fixed: a wrong class or box
            corrected (or dropped if another detection finds the object), other wrong detections
            dropped, missed objects not counted.
        false_positives: AP gained if every wrong detection scored below all correct ones.
        false_negatives: AP gained if objects that were not found did not count.
        max_detections: maximum detections per image, over all categories.
        threshold: minimum IoU of a correct detection.
        background: minimum IoU of a detection that refers to some object.
    """

    ap: float
    counts: dict[str, int]
    gains: dict[str, float]
    false_positives: float
    false_negatives: float
    max_detections: int
    threshold: float
    background: float


@dataclass(slots=True)
class _Verdicts:
    """The classification of N detections and G objects."""

    kind: Ints  # [N], position in KINDS, or _RIGHT
    counts: Bools  # [N], counts in the precision-recall curve
    fixed: Ints  # [N], object that the fixed detection would find, -1 for none
    used: Bools  # [G], found
    usable: Bools  # [G], would be found by a fixed detection


def error_breakdown(
    truth: GroundTruth,
    found: Found,
    *,
    threshold: float = 0.5,
    background: float = 0.1,
    max_detections: int = 100,
) -> ErrorBreakdown:
    """Classify the errors of a detector.

    Args:
        truth: the objects.
        found: the detections.
        threshold: minimum IoU of a correct detection.
        background: minimum IoU of a detection that refers to some object.
        max_detections: maximum detections per image, over all categories.
    """
    ranked = found.ranked(max_detections, by_category=False)
    verdicts = _Verdicts(
        np.full(len(ranked), _BACKGROUND), np.ones(len(ranked), np.bool_),
        np.full(len(ranked), -1), np.zeros(len(truth), np.bool_), np.zeros(len(truth), np.bool_),
    )  # fmt: skip
    for rows, objects, crowds in _images(truth, ranked):
        _judge(truth, ranked, rows, objects, crowds, threshold, background, verdicts)
    missed = ~truth.crowd & ~verdicts.used & ~verdicts.usable
    counts = {kind: int((verdicts.kind == row).sum()) for row, kind in enumerate(KINDS)}
    counts["missed"] = int(missed.sum())
    curves = _Curves(truth, ranked, verdicts, missed)
    ap = curves.ap()
    gains = {kind: max(0.0, curves.ap(fix=kind) - ap) for kind in KINDS}
    return ErrorBreakdown(
        ap=ap,
        counts=counts,
        gains=gains,
        false_positives=curves.ap(separate=True) - ap,
        false_negatives=curves.ap(found_only=True) - ap,
        max_detections=max_detections,
        threshold=threshold,
        background=background,
    )


def _images(truth: GroundTruth, ranked: Found) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Detections, objects and crowds of each image that has a detection."""
    order = np.argsort(truth.image, kind="stable")
    images = truth.image[order]
    for image in np.unique(ranked.image):
        first, last = np.searchsorted(ranked.image, [image, image + 1])
        start, stop = np.searchsorted(images, [image, image + 1])
        own = order[start:stop]
        yield np.arange(first, last), own[~truth.crowd[own]], own[truth.crowd[own]]


def _judge(
    truth: GroundTruth,
    ranked: Found,
    rows: Ints,
    objects: Ints,
    crowds: Ints,
    threshold: float,
    background: float,
    verdicts: _Verdicts,
) -> None:
    """Classify the detections of one image."""
    boxes, categories = ranked.boxes_xywh[rows], ranked.category[rows]
    iou = box_iou(boxes, truth.boxes_xywh[objects])
    same = categories[:, None] == truth.category[objects][None]
    taken = claim_first(np.where(same, iou, 0.0), threshold)
    right = taken >= 0
    verdicts.used[objects[taken[right]]] = True
    within = box_iou(boxes, truth.boxes_xywh[crowds], np.ones(len(crowds), np.bool_))
    own_crowd = categories[:, None] == truth.category[crowds][None]
    excused = ~right & ((within > threshold) & own_crowd).any(axis=1)
    verdicts.counts[rows] = ~excused
    if not len(objects):
        verdicts.kind[rows] = _BACKGROUND
        return
    used = verdicts.used[objects]
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    own_best, other_best, best = own.max(axis=1), other.max(axis=1), iou.max(axis=1)
    again = np.where(used[None], own, 0.0).max(axis=1)
    conditions = [
        right,
        (background <= own_best) & (own_best <= threshold),
        other_best >= threshold,
        again >= threshold,
        best <= background,
    ]
    kind = np.select(conditions, [_RIGHT, _PLACE, _CLASS, _DUPLICATE, _BACKGROUND], _BOTH)
    verdicts.kind[rows] = kind
    column = np.where(kind == _PLACE, own.argmax(axis=1), other.argmax(axis=1))
    hopeful = ((kind == _PLACE) | (kind == _CLASS)) & ~used[column]
    for row in np.flatnonzero(hopeful):  # best score first; the first on an object fixes it
        truth_row = objects[column[row]]
        if not verdicts.usable[truth_row]:
            verdicts.usable[truth_row] = True
            verdicts.fixed[rows[row]] = truth_row


def claim_first(iou: Floats, threshold: float) -> Ints:
    """Column that each row takes, rows in turn, the first in case of a tie; -1 for none."""
    reversed_ = claim(iou[:, ::-1], threshold, np.zeros(iou.shape[1], np.bool_))
    return np.where(reversed_ >= 0, iou.shape[1] - 1 - reversed_, -1)


class _Curves:
    """AP with one kind of error fixed."""

    def __init__(
        self, truth: GroundTruth, ranked: Found, verdicts: _Verdicts, missed: Bools
    ) -> None:
        self.truth, self.ranked, self.verdicts, self.missed = truth, ranked, verdicts, missed

    def ap(
        self, fix: str | None = None, *, separate: bool = False, found_only: bool = False
    ) -> float:
        """Mean AP over categories that have an object or a detection."""
        truth, ranked, verdicts = self.truth, self.ranked, self.verdicts
        asked = ~truth.crowd
        if fix == "missed":
            asked = asked & ~self.missed
        if found_only:
            asked = asked & verdicts.used
        right, category = verdicts.kind == _RIGHT, ranked.category
        counts = verdicts.counts
        if fix is not None and fix != "missed":
            repaired = verdicts.kind == KINDS.index(fix)
            helped = repaired & (verdicts.fixed >= 0)
            right = right | helped
            category = category.copy()
            category[helped] = truth.category[verdicts.fixed[helped]]
            counts = (counts & ~repaired) | helped
        scores = right.astype(np.float64) if separate else ranked.scores
        # tidecv puts correct ones last among equal scores once anything is fixed
        late = (verdicts.kind == _RIGHT) & (fix is not None or separate or found_only)
        num_objects = np.bincount(truth.category[asked], minlength=len(truth.names))
        results = []
        for number in range(len(truth.names)):
            rows = np.flatnonzero(counts & (category == number))
            if not len(rows) and not num_objects[number]:
                continue
            order = rows[np.lexsort((late[rows], -scores[rows]))]
            results.append(_precision(right[order], int(num_objects[number])))
        return float(np.mean(results)) if results else 0.0


def _precision(right: Bools, num_objects: int) -> float:
    if num_objects == 0 or not len(right):
        return 0.0
    true = np.cumsum(right)
    precision = np.maximum.accumulate((true / np.arange(1, len(right) + 1))[::-1])[::-1]
    place = np.searchsorted(true / num_objects, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[place].mean())
