"""Datasets in the layout of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import only, picture


def jsonl(folder: Path, *rows: dict[str, Any]) -> Path:
    picture(folder / "a.jpg")
    lines = [json.dumps({"file_name": "a.jpg"} | row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"objects": {"bbox": [[8, 6, 20, 16], [1, 2, 3, 4]], "category": [0]}}, "2 boxes, but 1"),
        ({"objects": {"bbox": [[8, 6, 20]], "category": [0]}}, "row 0: a bbox must be four"),
        ({"objects": {"box": [[8, 6, 20, 1]]}}, "row 0: objects have no 'category'"),
        ({"bbox": [[8, 6, 20, 16]]}, "no column 'objects'; its columns are image, bbox"),
        ({"objects": {"bbox": [[8, 6, 20, 16]], "category": [-1]}}, "category -1 is below 0"),
        ({"objects": [3]}, "objects must be a list of tables"),
    ],
)
def test_hub_rows_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(jsonl(tmp_path, row)))


def test_hub_boxes_may_be_corners_and_objects_null(tmp_path: Path) -> None:
    picture(tmp_path / "b.jpg")
    place = jsonl(
        tmp_path,
        {"objects": {"bbox": [[8, 6, 28, 22]], "category": [4]}},
        {"file_name": "b.jpg", "objects": None},
    )
    part = only(f"hub_xyxy:{place}")
    assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
    assert [(category.id, category.name) for category in part.categories] == [(4, "4")]
    assert len(part) == 2
    assert "objects are null" in part.notes[0]
