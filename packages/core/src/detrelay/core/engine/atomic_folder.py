"""Atomic writes: files and folders are old or new, never in between, even if the process is killed.

Everything is written under a hidden name in the same folder, synced to disk, and only then renamed.
A folder cannot be swapped for another in one rename, so an older one first gets a hidden name too;
`recover` finishes a replacement that a kill interrupted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL, _OLD, _GONE = "partial", "old", "gone"


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which becomes `target` when the block ends.

    An error in the block leaves `target` as it was. Missing parents are created.

    Args:
        target: the final name; anything of that name is replaced.
    """
    aside = aside_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _delete(aside)
    try:
        yield aside
        sync(aside)
        replace(aside, target)
    finally:
        _delete(aside)


def aside_of(target: Path) -> Path:
    """The hidden name under which `target` is written."""
    return _hidden(target, _PARTIAL)


def write_text(target: Path, text: str) -> None:
    """Replace a text file, in UTF-8 and with line endings unchanged."""
    with written_aside(target) as aside:
        aside.write_bytes(text.encode("utf-8"))


def replace(source: Path, target: Path) -> None:
    """Give a finished file or folder its final name, replacing what had this name.

    Both names are in one folder. A kill leaves the old or the new one, complete, under `target` or,
    between the two renames of a folder, under the name that `recover` knows.
    """
    if source.is_dir():
        recover(target)
        old = _hidden(target, _OLD)
        if target.exists():
            target.rename(old)
        source.rename(target)
        _sync_folder(target.parent)
        _delete(old)
    else:
        source.replace(target)
        _sync_folder(target.parent)


def recover(target: Path) -> None:
    """Finish a replacement that a kill interrupted."""
    old = _hidden(target, _OLD)
    if old.exists():
        if target.exists():
            _delete(old)
        else:
            old.rename(target)


def remove(folder: Path) -> None:
    """Delete a folder; a kill leaves all of it or nothing under its name."""
    gone = _hidden(folder, _GONE)
    _delete(gone)
    folder.rename(gone)
    _delete(gone)


def recover_all(parent: Path) -> None:
    """Finish every replacement and removal in a folder that a kill interrupted."""
    if not parent.is_dir():
        return
    for path in sorted(parent.glob(".*")):
        name, _, ending = path.name[1:].rpartition(".")
        if not name:
            continue
        if ending == _OLD:
            recover(parent / name)
        elif ending in (_PARTIAL, _GONE):
            _delete(path)


def sync(path: Path) -> None:
    """Sync a file, or a folder with all its contents, to disk."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        _sync_folder(path)
    else:
        with path.open("r+b") as file:  # Windows syncs only files open for writing
            os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders; there a rename is safe without it
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(target: Path, ending: str) -> Path:
    return target.with_name(f".{target.name}.{ending}")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
