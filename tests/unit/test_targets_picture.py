"""The picture of who learns what shows what the assigners return."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrelay.core.structures import Targets
from factories import make_targets
from targets_picture import Arguments, assign, learned, main, planted


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("cross_stage", {"class and box", "class only"}),
        ("union", {"class and box", "box only"}),
        ("one_to_many", {"class and box"}),
    ],
)
def test_each_row_shows_its_kind_of_pairs(name: str, kinds: set[str]) -> None:
    targets: Targets = make_targets((2,))
    stages = planted(targets.boxes, targets.labels.tolist(), classes=4)
    assignments = assign(name, stages, targets)
    for assignment in assignments:
        pairs = learned(assignment)
        assert set(pairs.values()) == kinds
        assert sum(kind != "box only" for kind in pairs.values()) == len(assignment.classes)
        assert sum(kind != "class only" for kind in pairs.values()) == len(assignment.boxes)
        strays = range(3 * len(targets), stages[0].boxes.shape[1])
        assert not {query for query, _ in pairs} & set(strays)


def write_data(folder: Path) -> None:
    (folder / "images").mkdir()
    Image.fromarray(np.full((48, 64, 3), 200, np.uint8)).save(folder / "images" / "a.png")
    annotations = {
        "images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 48}],
        "categories": [{"id": 3, "name": "cell"}],
        "annotations": [{"image_id": 7, "category_id": 3, "bbox": [16, 12, 32, 24]}],
    }
    (folder / "train.json").write_text(json.dumps(annotations), encoding="utf-8")


def test_it_draws_an_image_of_a_folder(tmp_path: Path) -> None:
    write_data(tmp_path)
    output = tmp_path / "targets.png"
    assert main(Arguments(tmp_path, "a.png", output)) == 0
    with Image.open(output) as picture:
        colors = picture.convert("RGB").getcolors(maxcolors=1000)
    assert colors is not None
    assert any(red > 150 and green < 80 and blue < 80 for _, (red, green, blue) in colors)
    with pytest.raises(ValueError, match=r"train.json names no image b.png"):
        main(Arguments(tmp_path, "b.png", output))
