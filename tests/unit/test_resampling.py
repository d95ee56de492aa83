"""AP of resampled images."""

from __future__ import annotations

import numpy as np
import pytest

from detrelay.core.evaluation.matching import match
from detrelay.core.evaluation.resampling import image_weights, resampled_ap
from detrelay.core.evaluation.tables import Detections, GroundTruth
from factories_scores import random_case


def test_resampled_ap_is_that_of_repeated_images() -> None:
    ground_truth, rows = random_case()
    truth = GroundTruth.from_coco(ground_truth)
    matches = match(truth, truth.place(Detections.from_rows(rows)), 100)
    weights = np.vstack([np.ones(6), image_weights(6, 20), np.zeros(6)])
    found = resampled_ap(matches, weights)
    for row, value in zip(weights[:-1], found[:-1], strict=True):
        ap = matches.average_precision(row)
        assert value == pytest.approx(ap[ap > -1].mean(), abs=1e-12)
    assert found[-1] == -1
    assert np.ptp(found[:-1]) > 0.02


def test_drawn_images_are_as_many_as_there_are() -> None:
    weights = image_weights(7, 50, seed=3)
    assert weights.sum(axis=1).tolist() == [7] * 50
    assert weights.tolist() == image_weights(7, 50, seed=3).tolist()
    assert weights.tolist() != image_weights(7, 50, seed=4).tolist()
