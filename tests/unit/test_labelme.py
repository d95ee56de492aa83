"""Labelme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import only, picture


def labelme(folder: Path, **shape: Any) -> Path:
    picture(folder / "a.jpg")
    shape = {"label": "cat", "points": [[8, 6], [28, 22]], "shape_type": "rectangle"} | shape
    content = {"shapes": [shape], "imagePath": r"..\pictures\a.jpg"}
    (folder / "a.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ({}, [8, 6, 20, 16]),
        ({"points": [[28, 22], [8, 6]]}, [8, 6, 20, 16]),
        ({"points": [[8, 6], [28, 6], [28, 22], [8, 22]]}, [8, 6, 20, 16]),
        ({"points": [[8, 6], [28, 14], [9, 22]], "shape_type": "polygon"}, [8, 6, 20, 16]),
        ({"points": [[8, 6], [28, 14], [9, 22]], "shape_type": None}, [8, 6, 20, 16]),
        ({"points": [[18, 14], [18, 22]], "shape_type": "circle"}, [10, 6, 16, 16]),
        ({"points": [[-4, 6], [28, 22]]}, [-4, 6, 32, 16]),  # clipped later, counted
    ],
)
def test_shapes_of_labelme(tmp_path: Path, shape: dict[str, Any], box: list[float]) -> None:
    assert only(labelme(tmp_path, **shape)).boxes_xywh.tolist() == [box]


def test_shapes_of_labelme_without_a_box(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no box and no list of categories"):
        open_place(str(labelme(tmp_path, points=[[8, 6]], shape_type="point")))
    for points in ("x", [[1]], [[1, "a"]], [[1, 2, 3]], None, [[1e400, 2], [3, 4]]):
        with pytest.raises(DataError, match=r"a\.json shapes\[0\]"):
            open_place(str(labelme(tmp_path, points=points)))
