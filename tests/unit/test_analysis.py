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
from detrelay.core.evaluation.tables import Detections, Found, GroundTruth
from detrelay.core.evaluation.tide import error_breakdown
from factories_scores import Row, found, random_case, truth


def placed(ground_truth: dict[str, Any], rows: list[Row]) -> tuple[GroundTruth, Found]:
    objects = GroundTruth.from_coco(ground_truth)
    return objects, objects.place(Detections.from_rows(rows))


CAT, DOG, OTHER_CAT = [0, 0, 20, 20], [100, 100, 50, 50], [300, 300, 40, 40]
TRUTH = truth(
    [
        {"bbox": CAT},
        {"bbox": DOG, "category_id": 9},
        {"bbox": OTHER_CAT},
        {"bbox": [200, 0, 10, 10]},  # nobody finds it
        {"bbox": [400, 0, 60, 60], "iscrowd": 1},
    ]
)
FOUND = [
    found(0.95, CAT),
    found(0.85, DOG),  # a dog taken for a cat
    found(0.75, [0, 0, 20, 18]),  # the first cat again
    found(0.65, [300, 300, 40, 16]),  # the second cat at IoU 0.4
    found(0.55, [500, 300, 9, 9], category=9),  # nothing there
    found(0.45, [410, 10, 20, 20]),  # in the crowd
    found(0.35, [100, 100, 50, 16], category=4),  # a dog at IoU 0.32 taken for a cat
]


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


def test_errors_by_hand() -> None:
    result = error_breakdown(*placed(TRUTH, FOUND))
    assert result.counts == {
        "classification": 1, "localization": 1, "both": 1, "duplicate": 1, "background": 2,
        "missed": 1,
    }  # fmt: skip  # the one in the crowd is sorted too, but no mistake
    # cats: right, wrong, wrong, wrong, wrong of 3 objects; recall 1/3 at precision 1; dogs: 0
    base = 34 / 101 / 2
    assert result.ap == pytest.approx(base)
    assert result.gains["localization"] == pytest.approx((34 + 33 / 2) / 101 / 2 - base)
    assert result.gains["classification"] == pytest.approx(1 / 2)  # the dog before the stray dog
    assert result.gains["missed"] == pytest.approx((51 - 34) / 101 / 2)
    assert result.gains["duplicate"] == 0


@pytest.mark.parametrize(
    "name",
    ["random", "aquarium", "bccd", "cards", "chess", "coco_fake100", "coco_mini", "trees"],
)
def test_errors_are_those_of_tidecv(
    name: str, assets: Path, request: pytest.FixtureRequest
) -> None:
    expected = json.loads((assets / "tide" / "tidecv.json").read_text())["figures"][name]
    if name == "random":
        case = random_case()
    else:
        folder = request.getfixturevalue("real_data") / name
        files = json.loads((folder / "expected_eval.json").read_text())
        case = tuple(
            json.loads((folder / files[key]).read_text()) for key in ("ground_truth", "detections")
        )
    result = error_breakdown(*placed(*case))
    assert result.counts == expected["counts"]
    assert 100 * result.ap == pytest.approx(expected["ap"], abs=1e-9)
    assert {kind: 100 * gain for kind, gain in result.gains.items()} == pytest.approx(
        expected["gains"], abs=1e-9
    )
    assert 100 * result.false_positives == pytest.approx(expected["false_positives"], abs=1e-9)
    assert 100 * result.false_negatives == pytest.approx(expected["false_negatives"], abs=1e-9)


def test_confusion_by_hand() -> None:
    result = confusion(*placed(TRUTH, FOUND), 0.4, 100)
    # rows cat, dog, nothing there; columns cat, dog, missed
    assert result.counts.tolist() == [[1, 0, 2], [1, 0, 0], [2, 1, 0]]
    assert result.excused == 1
    higher = confusion(*placed(TRUTH, FOUND), 0.9, 100)
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
    matches = match(*placed(TRUTH, FOUND), 100, np.array([0.5]))
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
    analysis = analysis_of(TRUTH, FOUND)
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
    for ground_truth, rows in ((truth([]), []), (truth([]), FOUND), (TRUTH, [])):
        analysis = analysis_of(ground_truth, rows)
        assert "nan" not in json.dumps(analysis.to_dict()).lower()
        draw_analysis(analysis, tmp_path)
