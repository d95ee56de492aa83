"""Annotations in columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detrelay.core.data.annotations import Annotations, doubtful_boxes
from detrelay.core.data.readers import coco
from factories_data import coco_content, write_coco


def random_boxes(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    limits = random.integers(200, 600, (count, 2))
    low = random.random((count, 2)) * limits * 0.9
    size = random.random((count, 2)) ** 2 * (limits - low)
    return np.concatenate([low, size], axis=1), limits


@pytest.mark.parametrize("count", [5, 40, 1000])
def test_boxes_in_another_convention_are_remarked(count: int) -> None:
    boxes, limits = random_boxes(count)
    assert doubtful_boxes(boxes, limits) is None
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    assert "would fit as corners" in str(doubtful_boxes(corners, limits))
    fractions = boxes / np.concatenate([limits, limits], axis=1)
    assert "look like fractions" in str(doubtful_boxes(fractions, limits))
    assert doubtful_boxes(boxes[:0], limits[:0]) is None


@pytest.fixture
def three(tmp_path: Path) -> Annotations:
    """Three images: the first with three boxes, one around a crowd, the second with one."""
    return coco.read(write_coco(tmp_path))


def test_selected_images_take_their_boxes_along(three: Annotations) -> None:
    some = three.select(np.array([2, 0]))
    assert some.image_ids.tolist() == three.image_ids[[2, 0]].tolist()
    assert [some.images.name(row) for row in range(2)] == ["c.png", "a.png"]
    kept = three.box_image == 0
    assert some.box_ids.tolist() == three.box_ids[kept].tolist()
    assert set(some.box_image.tolist()) == {1}  # where the first image stands now
    masked = three.select(np.array([True, False, True]))
    assert masked.image_ids.tolist() == three.image_ids[[0, 2]].tolist()
    assert set(masked.box_image.tolist()) == {0}


def test_boxes_are_left_out_in_all_columns(three: Annotations) -> None:
    fewer = three.with_boxes(three.crowd)
    assert fewer.crowd.all()
    assert len(fewer) == len(three)
    columns = (fewer.boxes_xywh, fewer.box_image, fewer.box_class, fewer.box_ids, fewer.areas)
    assert {len(column) for column in columns} == {int(three.crowd.sum())}


def test_coco_comes_back_as_it_was_read(three: Annotations) -> None:
    content, found = coco_content(), three.to_coco()
    assert sorted(entry["id"] for entry in found["images"]) == [
        *sorted(entry["id"] for entry in content["images"])
    ]
    boxes = {entry["id"]: entry["bbox"] for entry in content["annotations"]}
    assert {entry["id"]: entry["bbox"] for entry in found["annotations"]} == boxes
    assert found["categories"] == [{"id": 3, "name": "wheel"}, {"id": 90, "name": "door"}]
