"""Fingerprints that distinguish the data of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detrelay.core.data.fingerprint import all_differences, differences, fingerprint
from detrelay.core.data.readers import coco
from factories_data import coco_content, noise_image


def write(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of a file with these images, all of the same age."""
    folder.mkdir(exist_ok=True)
    for image in content["images"]:
        file = folder / image["file_name"]
        if not file.exists():
            noise_image(image["width"], image["height"]).save(file)
            os.utime(file, (1, 1))
    (folder / "train.json").write_text(json.dumps(content))
    return fingerprint(coco.read(folder / "train.json", None))


def move_a_box(content: dict[str, Any]) -> None:
    content["annotations"][0]["bbox"][0] += 1


def drop_a_box(content: dict[str, Any]) -> None:
    del content["annotations"][-1]


def reverse_images(content: dict[str, Any]) -> None:
    content["images"].reverse()


def add_an_image(content: dict[str, Any]) -> None:
    content["images"].append({"id": 99, "file_name": "d.png", "width": 20, "height": 20})


def renumber_an_image(content: dict[str, Any]) -> None:
    content["images"][2]["id"] = 9


def rename_a_class(content: dict[str, Any]) -> None:
    content["categories"][0]["name"] = "gate"


def swap_classes_of_boxes(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["category_id"] = 93 - entry["category_id"]


def make_a_crowd(content: dict[str, Any]) -> None:
    content["annotations"][1]["iscrowd"] = 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (move_a_box, ["boxes (same number)"]),
        (swap_classes_of_boxes, ["boxes (same number)"]),
        (make_a_crowd, ["boxes (same number)"]),
        (drop_a_box, ["number of boxes (4 -> 3)"]),
        (reverse_images, ["order of the images"]),
        (add_an_image, ["number of images (3 -> 4)"]),
        (renumber_an_image, ["ids or sizes of images"]),
        (rename_a_class, ["categories (wheel, door -> wheel, gate)"]),
    ],
)
def test_each_change_has_a_name(
    change: Callable[[dict[str, Any]], None], expected: list[str], tmp_path: Path
) -> None:
    content = coco_content()
    before = write(tmp_path, content)
    change(content)
    assert differences(before, write(tmp_path, content), moved=False) == expected


def test_other_pixels_are_noticed_by_size_and_time(tmp_path: Path) -> None:
    before = write(tmp_path, coco_content())
    os.utime(tmp_path / "a.png", (2, 2))
    touched = write(tmp_path, coco_content())
    assert differences(before, touched, moved=False) == ["image files (written since)"]
    assert differences(before, touched, moved=True) == []  # a copy may have times of its own
    noise_image(40, 30, seed=1).save(tmp_path / "a.png")
    other = write(tmp_path, coco_content())
    assert differences(before, other, moved=True) == ["image files (other sizes on disk)"]


def test_the_same_data_elsewhere_are_the_same(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, coco_content()) for name in ("here", "there"))
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert all_differences({"train": first}, {"train": second, "val": second}, moved=[]) == {}
