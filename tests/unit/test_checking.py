"""Defects reported for the boxes of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detrelay.apps.contact_sheet import draw_contact_sheet
from detrelay.core.data.checking import check_split
from detrelay.core.data.places import open_place
from factories_data import coco_content, many, write_coco


def test_crowded_images_and_single_boxes_are_remarked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": row, "image_id": 11, "category_id": 3, "bbox": [row / 9, 0, 5, 5]}
        for row in range(1, 102)
    ]
    content["annotations"].append(
        {"id": 500, "image_id": 5, "category_id": 90, "bbox": [0, 0, 5, 5]}
    )
    (part,) = open_place(str(write_coco(tmp_path, content))).splits.values()
    found = {defect.what: defect.examples for defect in check_split(part).defects}
    assert found["images have more than 100 boxes: mind num_queries and max_detections"] == [
        "a.png"
    ]
    assert found["categories have a single box"] == ["door"]


def test_a_category_that_outweighs_the_others_is_remarked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": row, "image_id": 11, "category_id": 90 if row < 3 else 3, "bbox": [row, 0, 5, 5]}
        for row in range(1, 12)
    ]
    write_coco(tmp_path, content)
    (part,) = open_place(str(tmp_path)).splits.values()
    (found,) = check_split(part).defects
    assert found.what.startswith("boxes of wheel are 82% of all")
    assert found.count == 9


def test_images_without_the_boxes_that_others_have_are_named(tmp_path: Path) -> None:
    part = many(tmp_path, [(20, 20)] * 10)
    assert check_split(part).defects == []
    kept = ~((part.box_image == 7) & (part.box_class == 1))
    (defect,) = check_split(part.with_boxes(kept)).defects
    assert defect.what == "images have no door, which 90% have: forgotten boxes?"
    assert (defect.count, defect.examples) == (1, ["7.png"])
    rare = ~((part.box_image > 3) & (part.box_class == 1))
    assert check_split(part.with_boxes(rare)).defects == []  # most images have no door
    assert check_split(part.select(np.arange(9)).with_boxes(kept[:18])).defects == []  # too few


def test_images_with_few_boxes_of_a_crowd_are_named(tmp_path: Path) -> None:
    content = coco_content()
    content["images"] = [
        {"id": n, "file_name": f"{n}.png", "width": 90, "height": 90} for n in range(10)
    ]
    content["annotations"] = [
        {"id": 100 * n + k, "image_id": n, "category_id": 3, "bbox": [8 * k, 8 * n, 7, 7]}
        for n in range(10)
        for k in range(1, 3 if n == 4 else 10)
    ]
    (part,) = open_place(str(write_coco(tmp_path, content))).splits.values()
    (defect,) = check_split(part).defects
    assert defect.what == "images have fewer than a third of the usual 9 boxes of wheel: forgotten?"
    assert defect.examples == ["4.png"]


def test_a_box_with_the_id_0_is_remarked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": n, "image_id": 11, "category_id": 3, "bbox": [9 * n, 0, 5, 5]} for n in range(3)
    ]
    (part,) = open_place(str(write_coco(tmp_path, content))).splits.values()
    (defect,) = check_split(part).defects
    assert defect.what.startswith("box has the id 0: pycocotools takes a hit on it for a miss")
    assert defect.examples == ["a.png: wheel [0, 0, 5, 5] (id 0)"]


def test_boxes_that_touch_a_border_but_for_rounding_lie_inside(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": 1, "image_id": 11, "category_id": 3, "bbox": [0, 0, 40.0003, 30.0002]},
        {"id": 2, "image_id": 11, "category_id": 90, "bbox": [-0.0003, 0, 9, 9]},
        {"id": 3, "image_id": 11, "category_id": 90, "bbox": [31.5, 0, 9, 9]},
    ]
    write_coco(tmp_path, content)
    (part,) = open_place(str(tmp_path)).splits.values()
    outside = [d for d in check_split(part).defects if "partly outside" in d.what]
    assert [(defect.count, len(defect.examples)) for defect in outside] == [(1, 1)]


def test_a_split_without_any_box_is_checked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = []
    write_coco(tmp_path, content)
    (part,) = open_place(str(tmp_path)).splits.values()
    checked = check_split(part)
    assert (checked.boxes, checked.images_without_boxes) == (0, len(part))
    draw_contact_sheet(part, "all", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0
