"""Ids in a file next to data whose format cannot store them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.kept_ids import FILE, with_kept_ids, write_ids
from detrelay.core.data.places import open_place
from detrelay.core.data.readers import coco
from detrelay.core.data.sample import Category
from detrelay.core.data.writing import write_data
from detrelay.core.errors import DataError
from factories_data import splits, write_coco


@pytest.fixture
def whole(tmp_path: Path) -> Annotations:
    part = coco.read(write_coco(tmp_path))
    write_ids(tmp_path, {"val": (part, [part.images.name(row) for row in range(len(part))])})
    return part


def numbered(part: Annotations) -> Annotations:
    """The same as a format without ids gives it, with categories in another order."""
    names = tuple(Category(row, entry.name) for row, entry in enumerate(part.categories[::-1]))
    return replace(
        part,
        categories=names,
        box_class=len(names) - 1 - part.box_class,
        image_ids=np.arange(len(part)),
        box_ids=np.arange(len(part.box_ids)),
        areas=np.zeros_like(part.areas),
        own_ids=False,
    )


def test_ids_come_back(whole: Annotations, tmp_path: Path) -> None:
    found = with_kept_ids(tmp_path, {"val": numbered(whole)})["val"]
    assert found.categories == whole.categories
    for column in ("image_ids", "box_ids", "areas", "box_class"):
        assert getattr(found, column).tolist() == getattr(whole, column).tolist()
    assert found.own_ids


def test_files_that_were_changed_keep_the_new_numbers(whole: Annotations, tmp_path: Path) -> None:
    fewer = numbered(whole).with_boxes(np.arange(len(whole.box_ids)) > 0)
    found = with_kept_ids(tmp_path, {"val": fewer})["val"]
    assert found.image_ids.tolist() == [0, 1, 2]
    assert "ids are renumbered" in found.notes[-1]


def test_without_such_a_file_nothing_changes_and_a_damaged_one_is_refused(
    whole: Annotations, tmp_path: Path
) -> None:
    part = numbered(whole)
    (tmp_path / "other").mkdir()
    assert with_kept_ids(tmp_path / "other", {"val": part})["val"] is part
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match="cannot read the ids in"):
        with_kept_ids(tmp_path, {"val": part})


def test_ids_of_files_that_were_changed_are_numbered_anew(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    write_data(splits(tmp_path / "from", crowd=False), "yolo", tmp_path / "to")
    (tmp_path / "to" / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    train = open_place(str(tmp_path / "to")).splits["train"]
    assert train.image_ids.tolist() == [1, 2, 3]
    assert "ids are renumbered" in train.notes[-1]
    (tmp_path / "to" / "detrelay_ids.json").write_text("[")
    with pytest.raises(DataError, match=r"cannot read the ids in .*detrelay_ids\.json"):
        open_place(str(tmp_path / "to"))
