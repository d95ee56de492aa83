"""CreateML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError

BOX = {"label": "cat", "coordinates": {"x": 18, "y": 14.0, "width": 20, "height": 16}}


def createml(folder: Path, *entries: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "empty.png"):
        Image.new("RGB", (40, 30)).save(folder / name)
    (folder / "_annotations.createml.json").write_text(json.dumps(entries))
    return folder


def test_boxes_by_their_centre(tmp_path: Path) -> None:
    entries = [{"image": "x/a.png", "annotations": [BOX]}, {"image": "empty.png"}]
    for split in ("train", "valid"):
        createml(tmp_path / split, *entries)
    place = open_place(str(tmp_path))
    assert list(place.splits) == ["train", "val"]
    for part in (*place.splits.values(), *open_place(str(tmp_path / "train")).splits.values()):
        assert len(part.image_ids) == 2
        assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
        assert [category.name for category in part.categories] == ["cat"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": 3}, r"\[0\]: annotations must be a list, found 3"),
        ({"annotations": [{"coordinates": {}}]}, r"annotations\[0\]: expected an object with a la"),
        ({"annotations": [{"label": "cat"}]}, r"\[0\]: coordinates must be an object, found None"),
        ({"annotations": [{**BOX, "coordinates": {"x": "wide"}}]}, r"annotations\[0\] x"),
        ({"image": None}, r"\[0\]: expected an object with an image"),
        ({"image": "b.png"}, r"1 images are not in .*: b\.png; name the folder"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    good = {"image": "a.png", "annotations": [BOX]}
    with pytest.raises(DataError, match=said):
        open_place(f"createml:{createml(tmp_path, {**good, **change}, good)}")
