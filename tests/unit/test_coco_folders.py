"""COCO files in their known layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.readers.coco_folders import read, recognises
from factories_data import write_coco


def placed(source: Path, *files: str) -> None:
    """The same COCO file at several places."""
    for file in files:
        file_path = source.parent / file
        file_path.parent.mkdir(parents=True, exist_ok=True)
        file_path.write_bytes(source.read_bytes())


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.json", "valid.json", "other.json"], ["train", "val"]),
        (["annotations/instances_val2017.json", "annotations/instances_train2017.json"],
         ["train", "val"]),
        (["train/_annotations.coco.json", "test/_annotations.coco.json"], ["train", "test"]),
        (["_annotations.coco.json"], ["all"]),
        (["any.json"], ["all"]),
    ],
)  # fmt: skip
def test_layouts_are_told_by_the_names_of_files(
    files: list[str], splits: list[str], tmp_path: Path
) -> None:
    source = write_coco(tmp_path)
    placed(source, *files)
    source.unlink()
    assert recognises(tmp_path)
    found = read(tmp_path, tmp_path / "images")
    assert list(found) == splits
    assert all(len(part) == 3 for part in found.values())


def test_a_file_is_a_split_of_its_own(tmp_path: Path) -> None:
    source = write_coco(tmp_path)
    assert recognises(source)
    assert list(read(source)) == ["all"]
    source.write_text('{"version": "5.0", "shapes": []}')  # of labelme
    assert not recognises(source)
    assert not recognises(tmp_path)


def test_several_files_without_known_names_are_not_clear(tmp_path: Path) -> None:
    source = write_coco(tmp_path)
    placed(source, "one.json", "two.json")
    assert not recognises(tmp_path)
