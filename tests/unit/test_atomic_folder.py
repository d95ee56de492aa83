"""Files and folders: old or new, even if the process is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from detrelay.core.engine.atomic_folder import (
    recover,
    recover_all,
    remove,
    replace,
    sync,
    write_text,
    written_aside,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_with(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "content").write_text(content)
    return path


def test_replacing_a_folder(tmp_path: Path) -> None:
    target = folder_with(tmp_path / "best", "old")
    replace(folder_with(tmp_path / "aside", "new"), target)
    assert (target / "content").read_text() == "new"
    assert names(tmp_path) == ["best"]


@pytest.mark.parametrize("new_is_in_place", [False, True])
def test_a_replacement_cut_short_is_finished(new_is_in_place: bool, tmp_path: Path) -> None:
    folder_with(tmp_path / ".best.old", "old")
    if new_is_in_place:
        folder_with(tmp_path / "best", "new")
    recover(tmp_path / "best")
    assert names(tmp_path) == ["best"]
    expected = "new" if new_is_in_place else "old"
    assert (tmp_path / "best" / "content").read_text() == expected


def test_every_replacement_and_removal_cut_short_is_finished(tmp_path: Path) -> None:
    folder_with(tmp_path / ".best.old", "old")
    folder_with(tmp_path / ".step_1.gone", "pruned")
    folder_with(tmp_path / ".step_2.partial", "half")
    (tmp_path / ".record.json.partial").write_text("ha")
    (tmp_path / ".lock").touch()
    recover_all(tmp_path)
    assert names(tmp_path) == [".lock", "best"]


def test_a_removed_folder_loses_its_name_before_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "step_1", "whole")
    monkeypatch.setattr("shutil.rmtree", lambda path, **options: None)  # killed right before
    remove(folder)
    assert names(tmp_path) == [".step_1.gone"]


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "record.json"
    write_text(target, "old")
    states = []

    def look(descriptor: int) -> None:
        states.append(target.read_text())

    monkeypatch.setattr(os, "fsync", look)
    write_text(target, "new")
    assert states == ["old", "new"]  # the file is synced under another name, then the folder
    assert names(tmp_path) == ["record.json"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "inner" / "picture.png"
    write_text(target, "old")

    def fail() -> None:
        with written_aside(target) as aside:
            aside.write_text("new, but")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert names(target.parent) == ["picture.png"]


def test_syncing_asks_for_nothing_that_windows_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There folders cannot be opened, and a file that is open for reading cannot be synced."""
    original: Callable[..., int] = os.open
    fsync: Callable[[int], None] = os.fsync
    synced = []

    def refuse_folders(path: str, flags: int, *rest: int, **options: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, flags, *rest, **options)

    def refuse_reading(descriptor: int) -> None:
        os.write(descriptor, b"")  # as Windows does, fails on what is open for reading
        fsync(descriptor)
        synced.append(descriptor)

    folder_with(tmp_path / "best", "new")
    monkeypatch.setattr(os, "open", refuse_folders)
    monkeypatch.setattr(os, "fsync", refuse_reading)
    sync(tmp_path)
    write_text(tmp_path / "best" / "content", "newer")
    assert len(synced) == 2
