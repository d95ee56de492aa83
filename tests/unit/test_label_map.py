"""One list of categories for training and evaluation; boxes that look like another convention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detrelay.core.data.coco import AnnotatedImages, Category, CocoDataset
from detrelay.core.data.label_map import chosen_categories, with_categories
from detrelay.core.data.readers import coco
from detrelay.core.errors import DataError
from factories_data import coco_content, write_coco


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_coco(folder, coco_content() | changes)


GROUP = {"id": 0, "name": "parts", "supercategory": "none"}
CLASSES = [
    {"id": 90, "name": "door", "supercategory": "parts"},
    {"id": 3, "name": "wheel", "supercategory": "parts"},
]


def test_a_category_that_is_a_mere_group_is_left_out_and_said(tmp_path: Path) -> None:
    data = CocoDataset(write(tmp_path, categories=[GROUP, *CLASSES]))
    assert data.categories == (Category(3, "wheel"), Category(90, "door"))
    assert [entry["id"] for entry in data.ground_truth["categories"]] == [3, 90]
    assert "category 0 parts left out" in data.report.summary()
    # named like a class of its own: no clash of names
    classes = [
        {"id": 0, "name": "door", "supercategory": "none"},
        {"id": 90, "name": "door", "supercategory": "door"},
        {"id": 3, "name": "wheel", "supercategory": "door"},
    ]
    assert CocoDataset(write(tmp_path, categories=classes)).categories == data.categories


@pytest.mark.parametrize(
    "categories",
    [
        [GROUP | {"name": "other"}, *CLASSES],  # nobody's supercategory
        [GROUP, CLASSES[0], CLASSES[1] | {"supercategory": "round"}],  # not of all
        [GROUP | {"supercategory": "things"}, *CLASSES],  # itself part of another
    ],
)
def test_other_categories_without_boxes_stay(tmp_path: Path, categories: Any) -> None:
    assert len(CocoDataset(write(tmp_path, categories=categories)).categories) == 3


def test_a_group_with_boxes_is_a_class(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"] = [GROUP, *CLASSES]
    content["annotations"][0]["category_id"] = 0
    assert len(CocoDataset(write_coco(tmp_path, content)).categories) == 3


def test_held_out_images_take_the_classes_of_training(tmp_path: Path) -> None:
    train = coco.read(write(tmp_path / "train"))
    content = coco_content()
    content["categories"] = [{"id": 90, "name": "door"}, {"id": 7, "name": "lamp"}]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 90]
    held_out = with_categories(coco.read(write_coco(tmp_path, content)), train)
    assert held_out.categories == train.categories
    data = AnnotatedImages(held_out)
    assert data[0].class_labels.tolist() == [1]
    assert [a["category_id"] for a in data.ground_truth["annotations"]] == [90, 90]
    assert "category 7 lamp left out" in data.report.summary()


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 90, "name": "wheel"}, {"id": 3, "name": "door"}],
        [{"id": 90, "name": "door"}, {"id": 3, "name": "wheel"}, {"id": 4, "name": "lamp"}],
    ],
)
def test_held_out_boxes_of_unknown_categories_are_refused(
    tmp_path: Path, categories: list[dict[str, Any]]
) -> None:
    train = coco.read(write(tmp_path / "train"))
    content = coco_content()
    content["categories"] = categories
    content["annotations"][0]["category_id"] = categories[-1]["id"]
    with pytest.raises(DataError, match=r"must be among those of .*3 wheel, 90 door\), found"):
        with_categories(coco.read(write_coco(tmp_path, content)), train)


def test_some_categories_can_be_chosen(tmp_path: Path) -> None:
    whole = coco.read(write(tmp_path))
    doors = AnnotatedImages(chosen_categories(whole, ["door"]))
    assert doors.categories == (Category(90, "door"),)
    assert [doors[row].class_labels.tolist() for row in range(3)] == [[0], [0], []]
    assert doors[0].boxes_xyxy.tolist() == [[30, 20, 40, 30]]
    assert "categories left out: 3 wheel (2 boxes)" in doors.report.summary()
    assert chosen_categories(whole) is whole
    with pytest.raises(DataError, match="no category 'dor'; known are 3 wheel, 90 door"):
        chosen_categories(whole, ["dor"])


def test_categories_without_boxes_can_be_dropped(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "lamp"}, *coco_content()["categories"]]
    whole = coco.read(write(tmp_path, categories=categories))
    assert [category.id for category in whole.categories] == [1, 3, 90]
    kept = chosen_categories(whole, keep_unused=False)
    assert [category.id for category in kept.categories] == [3, 90]
    assert kept.box_class.tolist() == [1, 0, 0, 1]
    with pytest.raises(DataError, match="no category with a box is left"):
        chosen_categories(whole, ["lamp"], keep_unused=False)


def test_the_summary_says_that_boxes_look_like_corners(tmp_path: Path) -> None:
    content = coco_content()
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
    path = write_coco(tmp_path, content)
    assert "would fit as corners" in CocoDataset(path).report.summary()
    content["annotations"] = [{**a, "bbox": [0.1, 0.2, 0.3, 0.5]} for a in content["annotations"]]
    path.write_text(json.dumps(content))
    assert "look like fractions" in CocoDataset(path).report.summary()
