"""Data written in other formats, there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.places import open_place
from detrelay.core.data.writing import WRITERS, write_data
from detrelay.core.errors import DataError
from factories_data import splits
from factories_formats import write_format


@pytest.mark.parametrize("name", WRITERS)
def test_conversion_there_and_back_keeps_everything(name: str, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    holds_crowds = name in ("coco", "parquet")
    before = splits(tmp_path / "from", crowd=holds_crowds)
    assert write_data(before, name, tmp_path / "to") == []
    found = open_place(str(tmp_path / "to"))
    assert found.format == {"parquet": "hub"}.get(name, name)
    assert list(found.splits) == ["train", "val"]
    for split, part in found.splits.items():
        was, now = before[split].to_coco(), part.to_coco()
        assert now["categories"] == was["categories"]
        assert [image["id"] for image in now["images"]] == [image["id"] for image in was["images"]]
        assert part.sizes.tolist() == before[split].sizes.tolist()
        rows = {row["id"]: row for row in now["annotations"]}
        assert rows.keys() == {row["id"] for row in was["annotations"]}
        for row in was["annotations"]:
            again = rows[row["id"]]
            assert again["bbox"] == pytest.approx(row["bbox"], abs=1e-6)
            assert again["area"] == pytest.approx(row["area"], abs=1e-6)
            for key in ("image_id", "category_id", "iscrowd"):
                assert again[key] == row[key]
        for row in range(len(part)):
            old, new = (pixels(one, row) for one in (before[split], part))
            assert np.array_equal(old, new)


def pixels(part: Annotations, row: int) -> np.ndarray:
    with Image.open(part.images.open(row)) as image:
        return np.array(image)


@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_what_a_format_cannot_hold_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    before = splits(tmp_path / "from", crowd=True)
    (note,) = write_data(before, name, tmp_path / "to")
    assert "1 crowd boxes of train left out" in note
    assert sum(len(part.box_ids) for part in open_place(str(tmp_path / "to")).splits.values()) == 6


def test_writing_refuses_what_is_not_clear(tmp_path: Path) -> None:
    place, _ = write_format("voc", tmp_path / "voc")
    found = open_place(place)
    with pytest.raises(DataError, match="unknown format to write yol; did you mean yolo"):
        write_data(found.splits, "yol", tmp_path / "to")
    with pytest.raises(DataError, match="exists and is not empty"):
        write_data(found.splits, "yolo", tmp_path / "voc")
