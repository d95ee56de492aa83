"""Which images a path, a folder or a pattern stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.apps.sources import open_source
from detrelay.apps.sources.item import FrameChoice, Request, Source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    (place / "sub").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.md", "README", "sub/a.jpg"):
        (place / name).touch()
    return place


def opened(place: Path, output: Path) -> Source:
    return open_source(Request(str(place), output, FrameChoice()))


def names(source: Source) -> list[str]:
    return [item.file_name for item in source.inputs]


def test_a_folder_stands_for_its_images_and_the_rest_is_counted(
    folder: Path, tmp_path: Path
) -> None:
    source = opened(folder, tmp_path / "out")
    assert names(source) == ["a.jpg", "b.PNG"]
    assert all(item.image_id is None for item in source.inputs)
    assert sorted(source.left_out.split(", ")) == [
        *("1 .md files", "1 files named ._* (AppleDouble)", "1 files without a suffix"),
        "1 folders",
    ]


def test_files_and_patterns_stand_for_themselves(folder: Path, tmp_path: Path) -> None:
    assert names(opened(folder / "a.jpg", tmp_path)) == ["a.jpg"]
    assert names(opened(folder / "*.jpg", tmp_path)) == ["a.jpg"]
    assert names(opened(folder / "**" / "*.jpg", tmp_path)) == ["a.jpg", "a.jpg"]


def test_drawings_are_not_gone_through(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds the images of --input .*; name another folder"):
        opened(folder, folder)
    source = opened(folder / "**" / "b.PNG", folder / "sub")
    assert (names(source), source.left_out) == (["b.PNG"], "")
    with pytest.raises(ValueError, match=r"no image there \(looked for .*; found 1 .md files\)"):
        opened(folder / "*.md", tmp_path)
