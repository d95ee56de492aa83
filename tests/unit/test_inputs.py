"""Which images a command goes through, and where drawings of them go."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.apps.inputs import find_inputs, listed_inputs
from factories_data import write_coco


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    (place / "sub").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.txt", "README", "sub/a.jpg"):
        (place / name).touch()
    return place


def test_a_folder_stands_for_its_images_and_the_rest_is_counted(
    folder: Path, tmp_path: Path
) -> None:
    inputs, left_out = find_inputs(str(folder), tmp_path / "out")
    assert [item.file_name for item in inputs] == ["a.jpg", "b.PNG"]
    assert inputs[0].source == folder / "a.jpg"
    assert inputs[0].target == tmp_path / "out" / "a.jpg.png"
    assert inputs[0].image_id is None
    assert sorted(left_out.split(", ")) == [
        *("1 .txt files", "1 files named ._* (AppleDouble)", "1 files without a suffix"),
        "1 folders",
    ]


def test_files_and_patterns_stand_for_themselves(folder: Path, tmp_path: Path) -> None:
    (one,) = find_inputs(str(folder / "a.jpg"), tmp_path)[0]
    assert one.source == folder / "a.jpg"
    inputs, _ = find_inputs(str(folder / "*.jpg"), tmp_path)
    assert [item.file_name for item in inputs] == ["a.jpg"]
    with pytest.raises(ValueError, match=r"two images have the same file name \(a.jpg, a.jpg\)"):
        find_inputs(str(folder / "**" / "*.jpg"), tmp_path)


def test_drawings_are_not_gone_through(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the images of --input .*; name another folder"):
        find_inputs(str(folder), folder)
    inputs, left_out = find_inputs(str(folder / "**" / "b.PNG"), folder / "sub")
    assert len(inputs) == 1
    assert left_out == ""
    with pytest.raises(ValueError, match=r"no image there \(looked for .*; found 1 .txt files\)"):
        find_inputs(str(folder / "*.txt"), tmp_path)


def test_listed_images_bring_their_ids_and_sizes(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    inputs = listed_inputs(path, None, tmp_path / "out", allow_outside=False)
    assert [(item.file_name, item.image_id, item.size) for item in inputs] == [
        ("a.png", 11, (30, 40)),
        ("b.png", 5, (32, 24)),
        ("c.png", 8, (20, 20)),
    ]
    assert [item.target.name for item in inputs] == ["a.png.png", "b.png.png", "c.png.png"]
