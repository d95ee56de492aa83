"""The folder of a run: one training at a time, and nothing lost because one file is damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from detrelay.core.engine import run_folder
from detrelay.core.engine.run_folder import RunFolderError, locked

FORK = multiprocessing.get_context("fork")


def hold(output: Path, told: Connection, loader: bool) -> None:
    """Lock the folder and keep running, with a child process like a loader process."""
    with locked(output):
        child = os.fork() if loader else 0
        if loader and child == 0:
            time.sleep(60)
            os._exit(0)
        told.send(child)
        time.sleep(60)


@pytest.fixture
def holder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Ids of a process that has the lock, and of its child (0 for none)."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(tmp_path, there, request.param))
    process.start()
    child = here.recv()
    assert process.pid is not None
    yield process.pid, child
    for number in (process.pid, child):
        if number:
            os.kill(number, signal.SIGKILL)
    process.join()


@pytest.mark.parametrize("holder", [False], indirect=True)
def test_a_folder_in_use_is_refused_in_one_line(holder: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is in use by another training; wait") as caught:
        locked(tmp_path).__enter__()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("holder", [True], indirect=True)
def test_the_lock_of_a_killed_process_is_free_though_its_loaders_live(
    holder: tuple[int, int], tmp_path: Path
) -> None:
    process, loader = holder
    os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with locked(tmp_path):
                break
        except RunFolderError:
            time.sleep(0.01)
    else:
        pytest.fail("the lock of a dead process was not taken over")
    os.kill(loader, 0)  # it is alive


def test_the_lock_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "new"):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"recipe": 3}', "\udcff", "[" * 100_000])
def test_a_damaged_record_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / run_folder.RECORD).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RunFolderError, match=r"training\.json: not the record of a run") as caught:
        run_folder.read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_copy_in_the_newest_readable_checkpoint_counts(tmp_path: Path) -> None:
    assert run_folder.newest_record(tmp_path) is None
    for step, content in ((1, {"record": {"recipe": {}}}), (2, {"record": None}), (3, [])):
        folder = tmp_path / run_folder.CHECKPOINTS / f"step_000000{step}"
        folder.mkdir(parents=True)
        (folder / run_folder.MARKER).write_text(json.dumps(content))
    assert run_folder.newest_record(tmp_path) == {"recipe": {}}


@pytest.mark.parametrize("text", [None, "", "{}", '{"measured": 3}'])
def test_a_model_without_figures_counts_as_lost(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / run_folder.RECORD).write_text(text)
    assert run_folder.measured(tmp_path) is None
