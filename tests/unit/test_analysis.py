"""Matching, confusion, calibration, thresholds and errors: by hand and against other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detrelay.apps.charts import draw_analysis
from detrelay.core.evaluation.analysis import (
    Analysis,
    analyse,
    best_threshold,
    calibration,
    confusion,
)
from detrelay.core.evaluation.backends import accumulate
from detrelay.core.evaluation.coco_ap import limits_of
from detrelay.core.evaluation.matching import match
from factories_scores import (
    CAT,
    PETS_FOUND,
    PETS_TRUTH,
    Row,
    found,
    placed,
    random_case,
    truth,
)


def test_confusion_by_hand() -> None:
    result = confusion(*placed(PETS_TRUTH, PETS_FOUND), 0.4, 100)
    # rows cat, dog, nothing there; columns cat, dog, missed
    assert result.counts.tolist() == [[1, 0, 2], [1, 0, 0], [2, 1, 0]]
    assert result.excused == 1
    higher = confusion(*placed(PETS_TRUTH, PETS_FOUND), 0.9, 100)
    assert higher.counts.tolist() == [[1, 0, 2], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.99])
def test_confusion_counts_every_object_and_every_kept_detection(threshold: float) -> None:
    objects, claims = placed(*random_case())
    result = confusion(objects, claims, threshold, 100)
    real = np.bincount(objects.category[~objects.crowd], minlength=2)
    assert result.counts[:-1].sum(axis=1).tolist() == real.tolist()
    kept = int((claims.select(claims.scores >= threshold).ranked(100).scores >= 0).sum())
    assert result.counts[:, :-1].sum() + result.excused == kept


def test_own_category_comes_before_the_better_overlap() -> None:
    ground_truth = truth([{"bbox": [0, 0, 20, 20], "category_id": 9}, {"bbox": [0, 0, 20, 30]}])
    result = confusion(*placed(ground_truth, [found(0.9, [0, 0, 20, 21])]), 0.3, 100)
    assert result.counts.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_best_threshold_and_calibration_by_hand() -> None:
    matches = match(*placed(PETS_TRUTH, PETS_FOUND), 100, np.array([0.5]))
    best = best_threshold(matches, 0)  # cats: right, then four wrong, of 3
    assert best is not None
    assert (best.score, best.f1, best.precision, best.recall) == (0.95, 0.5, 1.0, 1 / 3)
    assert best_threshold(matches, 1) is None
    bins = calibration(matches)
    assert bins.counts == [0, 0, 0, 1, 0, 1, 1, 1, 1, 1]  # not the one in the crowd
    assert bins.right[9] == 1
    assert bins.right[8] == 0
    assert bins.scores[8] == pytest.approx(0.85)
    assert bins.error == pytest.approx((0.05 + 0.85 + 0.75 + 0.65 + 0.55 + 0.35) / 6)


def test_equal_scores_share_a_threshold() -> None:
    rows = [found(0.5, CAT), found(0.5, [500, 0, 9, 9])]
    best = best_threshold(match(*placed(truth([{"bbox": CAT}]), rows), 100, np.array([0.5])), 0)
    assert best is not None
    assert (best.score, best.precision) == (0.5, 0.5)


def analysis_of(ground_truth: dict[str, Any], rows: list[Row]) -> Analysis:
    objects, claims = placed(ground_truth, rows)
    return analyse(objects, claims, accumulate(objects, claims, limits_of(100)))


def test_analysis_as_table_json_and_pictures(tmp_path: Path) -> None:
    analysis = analysis_of(PETS_TRUTH, PETS_FOUND)
    cells = [line.split() for line in analysis.table().splitlines()]
    assert cells[0][:4] == ["maxDets", "100", "objects", "AP"]
    cat = next(row for row in cells if row[:1] == ["cat"])
    assert cat[1:3] == ["3", "33.7"]
    assert cat[-3:-1] == ["0.95", "50.0"]
    content = json.loads(json.dumps(analysis.to_dict()))
    assert content["confusion"]["counts"] == analysis.confusion.counts.tolist()
    assert len(content["recalls"]) == len(content["curves"]["IoU 0.50"]) == 101
    for file in draw_analysis(analysis, tmp_path):
        with Image.open(file) as picture:
            assert min(picture.size) > 200


def test_analysis_of_nothing(tmp_path: Path) -> None:
    for ground_truth, rows in ((truth([]), []), (truth([]), PETS_FOUND), (PETS_TRUTH, [])):
        analysis = analysis_of(ground_truth, rows)
        assert "nan" not in json.dumps(analysis.to_dict()).lower()
        draw_analysis(analysis, tmp_path)
