"""Bootstrap of AP over images: how much of a figure is due to the choice of images."""

from __future__ import annotations

import numpy as np

from detrelay.core.evaluation.backends import RECALL_THRESHOLDS
from detrelay.core.evaluation.matching import Matches
from detrelay.core.evaluation.tables import Bools, Floats

_TINY = np.spacing(1)
_MAX_CELLS = 4_000_000  # in an intermediate table: 32 MB


def image_weights(images: int, replicates: int, seed: int = 0) -> Floats:
    """How often each image is drawn when sampling as many with replacement.

    Returns:
        float64 [replicates, images], rows that add up to `images`.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), replicates).astype(np.float64)


def resampled_ap(matches: Matches, weights: Floats) -> Floats:
    """AP for each row of image weights, the mean over thresholds and categories with objects.

    Args:
        matches: of one run.
        weights: float64 [R, I].

    Returns:
        float64 [R]; -1 where no drawn image has an object.
    """
    num_objects = weights @ matches.objects  # [R, K]
    total, measured = np.zeros(len(weights)), np.zeros(len(weights))
    for category, rows in enumerate(matches.by_score()):
        present = num_objects[:, category] > 0
        if not present.any():
            continue
        ap = np.zeros(len(weights))
        step = max(1, _MAX_CELLS // max(1, len(rows)))
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            weight = weights[part][:, matches.found.image[rows]]  # [r, n]
            for level in range(len(matches.thresholds)):
                ap[part] += _ap(
                    np.where(matches.ignored[level, rows], 0.0, weight),
                    matches.target[level, rows] >= 0,
                    num_objects[part, category],
                )
        total += np.where(present, ap / len(matches.thresholds), 0.0)
        measured += present
    return np.divide(total, measured, out=np.full(len(weights), -1.0), where=measured > 0)


def _ap(weight: Floats, right: Bools, num_objects: Floats) -> Floats:
    """AP [r] of detections by descending score, with weights [r, n], for `num_objects` [r]."""
    if not len(right):
        return np.zeros(len(weight))
    true = np.cumsum(np.where(right, weight, 0.0), axis=1)
    count = np.cumsum(weight, axis=1)
    precision = true / (count + _TINY)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = true / np.maximum(num_objects, _TINY)[:, None]
    padded = np.concatenate([precision, np.zeros((len(weight), 1))], axis=1)
    return np.array(
        [
            row[np.searchsorted(found, RECALL_THRESHOLDS, side="left")].mean()
            for row, found in zip(padded, recall, strict=True)
        ]
    )
