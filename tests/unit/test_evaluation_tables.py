"""Detections in columns: from files, rows and results, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detrelay.core.errors import DataError
from detrelay.core.evaluation.tables import (
    Detections,
    GroundTruth,
    box_iou,
    ids_of_files,
    read_detections,
)
from factories_scores import found, truth

ROWS = [
    found(0.75, [1.5, 2, 3, 6], category=9, image=2),
    found(0.1, [0.1, 0.2, 0.3, 0.4]),
]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.json"
    Detections.from_rows(ROWS).write(file)
    assert json.loads(file.read_text()) == ROWS
    again = read_detections(file)
    assert list(again.rows()) == ROWS
    Detections.concatenate([]).write(file)
    assert json.loads(file.read_text()) == []
    assert len(read_detections(file)) == 0


def test_rows_may_hold_more_and_masks(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    mask = {"segmentation": {"size": [3, 4], "counts": "x"}, "id": 7}
    file.write_text(json.dumps([row | mask for row in ROWS]))
    assert list(read_detections(file).rows()) == ROWS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"image_id": 1}, ["not a COCO results list", "expected a list"]),
        ([ROWS[0], {"image_id": 1, "category_id": 4, "score": 1}], ["detection 1", "no 'bbox'"]),
        ([ROWS[0], 5], ["entry 1 is a int"]),
        ([ROWS[0], None], ["1 detections, but 2 entries"]),
        ([ROWS[0] | {"bbox": [ROWS[1]]}], ["bbox of detection 1"]),
        ([ROWS[0] | {"image_id": 1.5}], ["image_id of detection 0", "whole number", "1.5"]),
        ([ROWS[0] | {"category_id": True}], ["category_id of detection 0", "True"]),
        ([ROWS[0] | {"image_id": 2**63}], ["64 bits"]),
        ([ROWS[0] | {"score": float("nan")}], ["score of detection 0", "finite"]),
    ],
)
def test_what_is_no_results_list_is_refused(content: Any, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_detections(file)
    for word in [str(file), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_detections(tmp_path / "none.json")
    (tmp_path / "half.json").write_text("[{")
    with pytest.raises(DataError, match=r"half\.json: not json"):
        read_detections(tmp_path / "half.json")


def test_rows_without_an_image_id_are_matched_by_file_name(tmp_path: Path) -> None:
    images = [
        {"id": 31, "file_name": "a/one.png"},
        {"id": 4, "file_name": "a/two.png"},
        {"id": 5, "file_name": "b/two.png"},
    ]
    ids = ids_of_files({"images": images})
    row = {key: value for key, value in ROWS[0].items() if key != "image_id"}
    file = tmp_path / "found.json"
    names = ["one.png", "b/two.png", "a/one.png"]
    file.write_text(json.dumps([row | {"file_name": name} for name in names]))
    assert read_detections(file, ids).image_ids.tolist() == [31, 5, 31]
    file.write_text(json.dumps([row | {"file_name": "two.png"}]))
    with pytest.raises(DataError, match=r"'two.png' is that of no or of several images"):
        read_detections(file, ids)
    with pytest.raises(DataError, match="no 'image_id'"):
        read_detections(file)


def test_results_become_columns_with_original_ids() -> None:
    results = [
        {
            "scores": torch.tensor([0.75, 0.1]),
            "labels": torch.tensor([1, 0]),
            "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.1, 0.2, 0.4, 0.6]]),
        },
        {"scores": torch.zeros(0), "labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)},
    ]
    columns = Detections.from_results(results, [31, 7], [4, 90])
    assert columns.category_ids.tolist() == [90, 4]
    assert columns.scores.tolist() == results[0]["scores"].tolist()  # float32 to the bit
    assert columns.boxes_xywh[0].tolist() == [1, 2, 3, 6]
    assert {array.dtype.name for array in (columns.scores, columns.boxes_xywh)} == {"float64"}


def test_parts_of_processes_make_one_whole() -> None:
    whole = Detections.from_rows(ROWS)
    parts = [whole.select(np.array([True, False])), whole.select(np.array([1]))]
    assert list(Detections.concatenate(parts).rows()) == ROWS


def test_the_best_of_an_image_or_of_its_categories_are_kept() -> None:
    ground_truth = GroundTruth.from_coco(truth([], num_images=2))
    rows = [
        found(0.1, [0, 0, 1, 1]),
        found(0.9, [0, 0, 2, 2], category=9),
        found(0.1, [0, 0, 3, 3]),
        found(0.5, [0, 0, 4, 4]),
        found(0.2, [0, 0, 5, 5], image=2),
    ]
    placed = ground_truth.place(Detections.from_rows(rows))

    def widths(limit: int, by_category: bool) -> list[float]:
        return placed.ranked(limit, by_category=by_category).boxes_xywh[:, 2].tolist()

    assert widths(2, True) == [4, 1, 2, 5]  # equal scores keep their order
    assert widths(2, False) == [2, 4, 5]


def test_an_object_of_an_unlisted_image_is_refused() -> None:
    with pytest.raises(DataError, match="annotation 0 of the ground truth names image_id 7"):
        GroundTruth.from_coco(truth([{"bbox": [0, 0, 1, 1], "image_id": 7}]))


def test_overlap_by_hand() -> None:
    boxes = np.array([[0.0, 0, 4, 4], [2, 0, 4, 4], [9, 9, 0, 0]])
    assert box_iou(boxes, boxes).tolist() == [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]]
    assert box_iou(boxes[1:2], boxes[:1], np.array([True])).tolist() == [[0.5]]
