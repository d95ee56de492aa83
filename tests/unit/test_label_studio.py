"""Label Studio."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import only, picture


def label_studio(folder: Path, *annotations: Any, **task: Any) -> Path:
    picture(folder / "images" / "0a1b2c3d-a.jpg", (200, 100))
    link = "/data/upload/1/0a1b2c3d-a.jpg"
    content = [{"id": 1, "data": {"image": link}, "annotations": list(annotations)} | task]
    (folder / "export.json").write_text(json.dumps(content))
    return folder / "export.json"


def rectangle(**value: Any) -> dict[str, Any]:
    box = {"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": ["cat"]}
    return {"type": "rectanglelabels", "value": box | value}


def test_label_studio_counts_in_percent(tmp_path: Path) -> None:
    done = {"result": [rectangle()]}
    assert only(label_studio(tmp_path, done)).boxes_xywh.tolist() == [[20, 20, 60, 40]]
    # a quarter turn about the upper left corner, in pixels
    turned = {"result": [rectangle(rotation=90)]}
    part = only(label_studio(tmp_path, turned))
    assert part.boxes_xywh.tolist() == [pytest.approx([-20, 20, 40, 60])]
    part = only(label_studio(tmp_path, {"was_cancelled": True, "result": []}, done, done))
    assert len(part.box_ids) == 1
    assert part.notes == (
        "1 cancelled annotations left out",
        "1 tasks with several annotations; the first of each is taken",
    )


@pytest.mark.parametrize(
    ("annotations", "task", "message"),
    [
        ([], {"predictions": [{"result": [rectangle()]}]}, "no images found"),
        ([{"result": None}], {}, "task 1: result must be a list"),
        ([{"result": [rectangle(x=None)]}], {}, "task 1 x: expected a number"),
        ([{"result": [{"type": "rectanglelabels"}]}], {}, "task 1: a result has no value"),
        ([{"result": []}], {"data": {}}, "task 1: data names no image"),
        ([{"result": []}], {"data": {"image": "x/y.jpg"}}, r"1 images are not in .*: y\.jpg"),
        ([3], {}, "annotations must be a list of objects"),
    ],
)
def test_label_studio_that_is_refused(
    tmp_path: Path, annotations: list[Any], task: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(label_studio(tmp_path, *annotations, **task)))
