"""Which images a path, a folder, a pattern or a data set stands for."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.apps.sources import open_source
from detrelay.apps.sources.dataset import open_dataset
from detrelay.apps.sources.item import FrameChoice, Input, Source, Wanted, flat_name
from factories_data import write_coco


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    (place / "sub").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "._a.jpg", "notes.md", "README", "sub/a.jpg"):
        (place / name).touch()
    return place


def opened(place: Path, output: Path) -> Source:
    return open_source(Wanted(str(place), output, FrameChoice()))


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


def test_images_of_a_data_set_bring_their_ids(tmp_path: Path) -> None:
    source = open_dataset(write_coco(tmp_path), None, allow_outside=False)
    listed: list[Input] = list(source.inputs)
    assert [(item.file_name, item.image_id) for item in listed] == [
        *(("a.png", 11), ("b.png", 5), ("c.png", 8)),
    ]
    assert [tuple(item.read(10_000).shape) for item in listed] == [
        *((3, 30, 40), (3, 32, 24), (3, 20, 20)),
    ]


def test_paths_and_addresses_become_names_of_files() -> None:
    assert flat_name("../a\\b/./c.png") == "a__b__c.png"
    assert flat_name("https://host:80/a.png?size=1") == "https__host80__a.png_size=1"
    assert len(flat_name("x" * 400)) == 120
