"""The folder of a run: the names of its files, its record, and its lock.

Imports neither torch nor accelerate, so that commands can inspect a folder at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from detrelay.core.engine.atomic_folder import write_text

RECORD = "training.json"
"""Facts of the run; also in every saved model's folder, with its measured figures."""
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
BEST = "best"
LAST = "last"
FAILURES = "failures"
RESULTS = "results.json"
CURVES = "curves.png"
PICTURES = "pictures"
LOCK = ".lock"
MARKER = "complete.json"
"""In a checkpoint: position, hashes of its files and the record of the run."""

_CHECKPOINT = re.compile(r"step_(\d{7,})")

_OF_A_RUN = (RECORD, METRICS, CHECKPOINTS, BEST, LAST)


class RunFolderError(ValueError):
    """The folder cannot be used for this run."""


def remains_of_a_run(output: Path) -> list[str]:
    """Names in a folder that only a run leaves."""
    return [name for name in _OF_A_RUN if (output / name).exists()]


def read_record(folder: Path) -> dict[str, Any]:
    """The recorded facts of a run.

    Raises:
        RunFolderError: there is no such file, or it is not the record of a run.
    """
    file = folder / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{file}: not the record of a run ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("recipe"), dict):
        raise RunFolderError(f"{file}: not the record of a run (it holds no recipe)")
    return record


def measured(model: Path) -> dict[str, Any] | None:
    """The measured figures of a saved model; None if the folder is missing or damaged."""
    try:
        facts = json.loads((model / RECORD).read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Replace the facts of a run."""
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock a run's folder for this process; the system releases it when the process ends.

    Raises:
        RunFolderError: another training process holds the lock.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFolderError(
            f"{output} is in use by another training; wait for its end, or name another --output"
        ) from error
    try:
        yield
    finally:
        # while it is still held, so that a waiting process notices that the old file was unlinked
        with suppress(OSError):
            (output / LOCK).unlink(missing_ok=True)
        lock.release()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Position, files and record of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written.
    """
    content = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{checkpoint / MARKER} is not what was written")
    return content


def newest_record(output: Path) -> dict[str, Any] | None:
    """The facts of the run from its newest readable checkpoint; None if there is none."""
    for checkpoint in reversed(checkpoints(output / CHECKPOINTS)):
        try:
            record = read_marker(checkpoint).get("record")
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("recipe"), dict):
            return record
    return None
