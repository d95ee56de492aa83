"""Image stores of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from detrelay.core.data.images import ImageFiles, Selected
from detrelay.core.errors import DataError


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    """Three names, of which the second has no file."""
    (tmp_path / "a.png").touch()
    (tmp_path / "c.png").touch()
    return ImageFiles(tmp_path, ["a.png", "b.png", "c.png"], "set.json")


def test_files_are_named_opened_and_missed(files: ImageFiles, tmp_path: Path) -> None:
    assert files.name(1) == "b.png"
    assert files.open(2) == tmp_path / "c.png"
    assert files.open(1) == tmp_path / "b.png"  # whose absence is then told by its name
    assert files.missing() == ["b.png"]
    assert files.place() == f"folder {tmp_path}"


def test_the_first_folder_that_has_a_file_counts(tmp_path: Path) -> None:
    for folder, name in (("one", "a.png"), ("two", "a.png"), ("two", "b.png")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch()
    found = ImageFiles([tmp_path / "one", tmp_path / "two"], ["a.png", "b.png"], "set.json")
    assert [found.open(row) for row in (0, 1)] == [tmp_path / "one/a.png", tmp_path / "two/b.png"]


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set\.json: a file name holds half a character"):
        ImageFiles(tmp_path, ["\ud800.png"], "set.json")


def test_selected_images_have_an_order_of_their_own(files: ImageFiles, tmp_path: Path) -> None:
    some = Selected(files, np.array([2, 1]))
    assert [some.name(row) for row in (0, 1)] == ["c.png", "b.png"]
    assert some.open(0) == tmp_path / "c.png"
    assert some.missing() == ["b.png"]
    assert Selected(files, np.array([2, 0])).missing() == []
    assert (some.place(), some.advice("b.png")) == (files.place(), files.advice("b.png"))
