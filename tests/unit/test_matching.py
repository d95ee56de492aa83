"""Matching of detections to objects."""

from __future__ import annotations

from typing import Any

import numpy as np

from detrelay.core.evaluation.backends import accumulate
from detrelay.core.evaluation.matching import match
from factories_scores import (
    placed,
    random_case,
)


def test_matches_give_the_average_precision_of_the_back_end() -> None:
    objects, claims = placed(*random_case())
    ap = match(objects, claims, 100).average_precision()
    expected = accumulate(objects, claims, [100]).precision[:, :, :, 0, 0].mean(axis=1)
    np.testing.assert_allclose(ap, expected, rtol=0, atol=1e-15)


def test_whole_weights_repeat_images() -> None:
    ground_truth, rows = random_case()
    weights = np.array([2.0, 0, 1, 3, 1, 0])
    repeated: dict[str, Any] = {**ground_truth, "images": [], "annotations": []}
    twins = []
    for image, weight in enumerate(weights.astype(int).tolist(), start=1):
        for copy in range(weight):
            id = 10 * image + copy
            repeated["images"].append({"id": id})
            for source, target in (
                (ground_truth["annotations"], repeated["annotations"]),
                (rows, twins),
            ):
                target += [row | {"image_id": id} for row in source if row["image_id"] == image]
    weighted = match(*placed(ground_truth, rows), 100).average_precision(weights)
    np.testing.assert_allclose(
        weighted, match(*placed(repeated, twins), 100).average_precision(), rtol=0, atol=1e-12
    )
