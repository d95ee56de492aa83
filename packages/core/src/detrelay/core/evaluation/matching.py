"""Match detections to objects by COCO's rule, the basis of every analysis beyond AP."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from detrelay.core.evaluation.backends import IOU_THRESHOLDS, RECALL_THRESHOLDS
from detrelay.core.evaluation.tables import Bools, Floats, Found, GroundTruth, Ints, box_iou

_ALMOST_ONE = 1 - 1e-10
_TINY = np.spacing(1)


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Detections matched to objects of their own category, at one or more IoU thresholds.

    Attributes:
        found: the N detections considered, ordered by image, category and descending score.
        target: int64 [T, N], row of the object matched to each; -1 for none.
        ignored: bool [T, N], detections on crowds, which count neither as correct nor as wrong.
        objects: int64 [I, K], objects to find, crowds not counted.
        thresholds: float64 [T].
    """

    found: Found
    target: Ints
    ignored: Bools
    objects: Ints
    thresholds: Floats

    def average_precision(self, weights: Floats | None = None) -> Floats:
        """AP by threshold and category, -1 if there is nothing to find.

        Args:
            weights: float64 [I], how often each image counts; once each if None. Integers give the
                figures of a dataset with repeated images.

        Returns:
            float64 [T, K].
        """
        images, categories = self.objects.shape
        weights = np.ones(images) if weights is None else weights
        num_objects = weights @ self.objects
        result = np.full((len(self.thresholds), categories), -1.0)
        for category, rows in enumerate(self.by_score()):
            if num_objects[category] > 0:
                weight = weights[self.found.image[rows]]
                result[:, category] = [
                    _average_precision(
                        np.where(self.ignored[level, rows], 0.0, weight),
                        self.target[level, rows] >= 0,
                        float(num_objects[category]),
                    )
                    for level in range(len(self.thresholds))
                ]
        return result

    def by_score(self) -> list[Ints]:
        """Rows of each category by descending score; equal scores keep the order of images."""
        order = np.lexsort((-self.found.scores, self.found.category))
        borders = np.searchsorted(self.found.category[order], np.arange(self.objects.shape[1] + 1))
        return [order[start:stop] for start, stop in pairwise(borders)]


def match(
    truth: GroundTruth,
    found: Found,
    max_detections: int,
    thresholds: Floats = IOU_THRESHOLDS,
) -> Matches:
    """Match detections to objects of their category, best score first.

    A detection takes the free object that it overlaps most, by at least the threshold; the later
    one in case of a tie. It takes a crowd only if no object is left for it, and any number of
    detections may take the same crowd.

    Args:
        truth: the objects.
        found: the detections.
        max_detections: maximum detections per category and image.
        thresholds: float64 [T], minimum IoU.
    """
    ranked = found.ranked(max_detections)
    target = np.full((len(thresholds), len(ranked)), -1, dtype=np.int64)
    ignored = np.zeros(target.shape, dtype=np.bool_)
    categories = len(truth.names)
    slot = truth.image * categories + truth.category
    rows = np.lexsort((truth.crowd, slot))  # crowds last
    claims = ranked.image * categories + ranked.category  # ascending
    for start, stop in _runs(slot[rows]):
        group = rows[start:stop]
        first, last = np.searchsorted(claims, [slot[group[0]], slot[group[0]] + 1])
        if first == last:
            continue
        iou = box_iou(ranked.boxes_xywh[first:last], truth.boxes_xywh[group], truth.crowd[group])
        for level, threshold in enumerate(thresholds):
            taken = claim(iou, threshold, truth.crowd[group])
            hit = taken >= 0
            crowd = hit & truth.crowd[group][taken]
            ignored[level, first:last] = crowd
            target[level, first:last] = np.where(hit & ~crowd, group[taken], -1)
    objects = np.zeros((len(truth.image_ids), categories), dtype=np.int64)
    np.add.at(objects, (truth.image[~truth.crowd], truth.category[~truth.crowd]), 1)
    return Matches(ranked, target, ignored, objects, thresholds)


def claim(iou: Floats, threshold: float, crowd: Bools) -> Ints:
    """Column that each row takes, rows in turn; -1 for none.

    Args:
        iou: [N, G], best scores first, crowds last.
        threshold: minimum IoU.
        crowd: [G].
    """
    taken = np.full(len(iou), -1, dtype=np.int64)
    free = np.ones(iou.shape[1], dtype=np.bool_)
    least = min(threshold, _ALMOST_ONE)
    single = np.flatnonzero(~crowd)
    for row in np.flatnonzero((iou >= least).any(axis=1)):
        columns = single[free[single]]
        if not (iou[row, columns] >= least).any():
            columns = np.flatnonzero(crowd)
        fit = columns[iou[row, columns] >= least]
        if len(fit):
            values = iou[row, fit]
            taken[row] = fit[len(values) - 1 - int(np.argmax(values[::-1]))]  # the last of ties
            free[taken[row]] = bool(crowd[taken[row]])
    return taken


def _average_precision(weight: Floats, right: Bools, num_objects: float) -> float:
    """Mean precision at 101 recalls.

    Args:
        weight: [N] by descending score; 0 for detections that do not count.
        right: [N].
        num_objects: number of objects.
    """
    true = np.cumsum(np.where(right, weight, 0.0))
    false = np.cumsum(np.where(right, 0.0, weight))
    precision = true / (true + false + _TINY)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(true / num_objects, RECALL_THRESHOLDS, side="left")
    return float(np.mean(np.append(precision, 0.0)[place]))


def _runs(values: Ints) -> list[tuple[int, int]]:
    """First and past-the-last position of each run of equal values."""
    if not len(values):
        return []
    starts = np.flatnonzero(np.diff(values)) + 1
    return list(zip([0, *starts.tolist()], [*starts.tolist(), len(values)], strict=True))
