"""COCO figures: by hand, against the stock evaluator, and against recorded results."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detrelay.core.errors import DataError
from detrelay.core.evaluation.coco_ap import (
    CocoResult,
    detections_from_results,
    evaluate_coco,
)
from detrelay.core.evaluation.tables import read_detections
from factories_scores import HAND_FOUND, HAND_TRUTH, SMALL, Row, found, random_case, truth


def test_figures_by_hand() -> None:
    result = evaluate_coco(HAND_TRUTH, HAND_FOUND)
    # 101 recall points: precision 1 up to recall 0.5 (51 points), then 2/3 or 0
    both, one = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert result.stats == pytest.approx(
        {
            "AP": (both + one) / 2,
            "AP50": both,
            "AP75": one,
            "AP_small": 1.0,
            "AP_medium": 0.5,
            "AP_large": -1.0,
            "AR_1": 0.5,
            "AR_10": 0.75,
            "AR_100": 0.75,
            "AR_small": 1.0,
            "AR_medium": 0.5,
            "AR_large": -1.0,
        }
    )
    assert result.per_category == pytest.approx({"cat": (both + one) / 2, "dog": -1.0})


def test_detections_in_a_crowd_are_no_mistakes() -> None:
    crowd = truth([{"bbox": [290, 290, 60, 60], "iscrowd": 1}, *HAND_TRUTH["annotations"]])
    for number, row in enumerate(crowd["annotations"]):
        row["id"] = number
    assert evaluate_coco(crowd, HAND_FOUND).stats["AP50"] == pytest.approx(1.0)


def test_annotation_id_zero_can_be_found() -> None:
    only = truth([{"bbox": SMALL, "id": 0}])
    assert evaluate_coco(only, HAND_FOUND[:1]).stats["AP"] == pytest.approx(1.0)


def test_area_and_crowd_mark_may_be_missing() -> None:
    bare = copy.deepcopy(HAND_TRUTH)
    for row in bare["annotations"]:
        del row["area"], row["iscrowd"]
    assert evaluate_coco(bare, HAND_FOUND) == evaluate_coco(HAND_TRUTH, HAND_FOUND)


def test_equal_scores_rank_by_order() -> None:
    only = truth([{"bbox": SMALL}])
    right, wrong = found(0.5, [0, 0, 20, 20]), found(0.5, [300, 300, 30, 30])
    assert evaluate_coco(only, [right, wrong]).stats["AP"] == pytest.approx(1.0)
    assert evaluate_coco(only, [wrong, right]).stats["AP"] == pytest.approx(0.5)


def test_nothing_found_gives_zeros() -> None:
    result = evaluate_coco(HAND_TRUTH, [])
    assert [result.stats[name] for name in ("AP", "AP_small", "AR_100")] == [0, 0, 0]
    assert result.per_category == {"cat": 0.0, "dog": -1.0}


def test_nothing_to_find_gives_minus_one() -> None:
    result = evaluate_coco(truth([]), HAND_FOUND)
    assert set(result.stats.values()) == {-1.0}


def grid(count: int) -> list[list[float]]:
    return [[20.0 * (k % 30), 20.0 * (k // 30), 10.0, 10.0] for k in range(count)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (100, {"AP": 67 / 101, "AP50": 67 / 101, "AR_100": 2 / 3, "AR_small": 2 / 3}),
        (300, {"AP": 67 / 101, "AP50": 1, "AR_100": 2 / 3, "AR_300": 1, "AR_small": 1}),
        (50, {"AP": 34 / 101, "AP50": 34 / 101, "AR_10": 1 / 15, "AR_100": 1 / 3}),
        (5, {"AR_1": 1 / 150, "AR_10": 1 / 30, "AR_100": 1 / 30}),
    ],
)
def test_limit_on_detections(limit: int, expected: dict[str, float]) -> None:
    boxes = grid(150)
    detections = [found(1 - k / 1000, box) for k, box in enumerate(boxes)]
    result = evaluate_coco(
        truth([{"bbox": box} for box in boxes]), detections, max_detections=limit
    )
    assert {name: result.stats[name] for name in expected} == pytest.approx(expected)
    assert ("AR_300" in result.stats) == (limit == 300)
    assert result.max_detections == limit


def test_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_detections must be at least 1, found 0"):
        evaluate_coco(HAND_TRUTH, HAND_FOUND, max_detections=0)


@pytest.mark.parametrize("limits", [(1, 10, 100), (100, 300, 1000)])
def test_figures_are_those_of_the_stock_evaluator(limits: tuple[int, int, int]) -> None:
    ground_truth, detections = random_case()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        stock = COCOeval(coco, coco.loadRes(copy.deepcopy(detections)), "bbox")
        stock.params.maxDets = list(limits)
        stock.evaluate()
        stock.accumulate()
        stock.summarize()
    ours = evaluate_coco(ground_truth, detections, max_detections=limits[-1]).stats
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    names += [f"AR_{limits[0]}", None, f"AR_{limits[2]}", "AR_small", "AR_medium", "AR_large"]
    for name, value in zip(names, stock.stats, strict=True):
        if name is not None:  # the middle limit differs
            assert ours[name] == pytest.approx(value, abs=1e-12), name
    assert 0.05 < ours["AP"] < 0.95


def test_nothing_is_printed_and_nothing_changed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, detections = copy.deepcopy(HAND_TRUTH), copy.deepcopy(HAND_FOUND)
    evaluate_coco(ground_truth, detections)
    assert capsys.readouterr() == ("", "")
    assert ground_truth == HAND_TRUTH
    assert detections == HAND_FOUND


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 77}, ["image_id 77"]),
        ({"category_id": 1}, ["category_id 1"]),
        ({"bbox": [0, 0, 1]}, ["bbox", "four finite", "[0, 0, 1]"]),
        ({"bbox": [0, 0, 1, 10**400]}, ["bbox", "four finite"]),
        ({"score": 10**400}, ["score", "finite number"]),
        ({"bbox": [0, 0, float("nan"), 1]}, ["bbox", "nan"]),
        ({"bbox": [0, 0, -1, 1]}, ["bbox", "-1"]),
        ({"bbox": None}, ["bbox", "None"]),
        ({"score": float("inf")}, ["score", "inf"]),
        ({"score": "0.5"}, ["score", "'0.5'"]),
    ],
)
def test_malformed_detections_are_refused(change: Row, words: list[str]) -> None:
    rows = [*HAND_FOUND[:2], HAND_FOUND[2] | change]
    with pytest.raises(DataError) as error:
        evaluate_coco(HAND_TRUTH, rows)
    message = str(error.value)
    assert "\n" not in message
    for word in ["detection 2", *words]:
        assert word in message


def test_detection_without_a_score_is_refused() -> None:
    row = {key: value for key, value in HAND_FOUND[0].items() if key != "score"}
    with pytest.raises(DataError, match="detection 0 has no 'score'"):
        evaluate_coco(HAND_TRUTH, [row])


def test_categories_must_differ_in_name() -> None:
    twice = HAND_TRUTH | {"categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "cat"}]}
    with pytest.raises(DataError, match="share a name"):
        evaluate_coco(twice, [])


def test_results_become_rows_with_original_ids() -> None:
    results = [
        {
            "scores": torch.tensor([0.75, 0.5]),
            "labels": torch.tensor([1, 0]),
            "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.5, 0.25, 1.5, 2.25]]),
        },
        {"scores": torch.zeros(0), "labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)},
    ]
    rows = detections_from_results(results, [31, 7], [4, 90])
    assert rows == [
        {"image_id": 31, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.75},
        {"image_id": 31, "category_id": 4, "bbox": [0.5, 0.25, 1, 2], "score": 0.5},
    ]
    assert json.loads(json.dumps(rows)) == rows
    with pytest.raises(DataError, match=r"class index 1 in image 31.* 1 categories"):
        detections_from_results(results, [31, 7], [4])
    with pytest.raises(ValueError, match="shorter"):
        detections_from_results(results, [31], [4, 90])


def test_table_shows_percent_and_dashes() -> None:
    lines = evaluate_coco(HAND_TRUTH, HAND_FOUND).table().splitlines()
    cells = [line.split() for line in lines]
    assert ["AP50", "83.5", "maxDets", "100"] in cells
    assert ["AR_10", "75.0", "maxDets", "10"] in cells
    assert ["AP_large", "-", "maxDets", "100"] in cells
    assert ["cat", "67.0"] in cells
    assert ["dog", "-"] in cells


def test_result_survives_json() -> None:
    result = evaluate_coco(HAND_TRUTH, HAND_FOUND)
    loaded = json.loads(json.dumps(result.to_dict()))
    again = CocoResult(loaded["stats"], loaded["AP_per_category"], loaded["max_detections"])
    assert again == result


@pytest.mark.parametrize("backend", ["pycocotools", "hotcoco"])
@pytest.mark.parametrize(
    "folder", ["aquarium", "bccd", "cards", "chess", "coco_fake100", "coco_mini", "trees"]
)
def test_recorded_figures_are_reproduced(real_data: Path, folder: str, backend: str) -> None:
    expected = json.loads((real_data / folder / "expected_eval.json").read_text())
    ground_truth = json.loads((real_data / folder / expected["ground_truth"]).read_text())
    detections = read_detections(real_data / folder / expected["detections"])
    result = evaluate_coco(ground_truth, detections, backend=backend)
    assert {name: round(value, 6) for name, value in result.stats.items()} == expected["stats"]
    per_category = {name: round(value, 6) for name, value in result.per_category.items()}
    assert per_category == expected["AP_per_category"]
