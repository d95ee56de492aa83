"""The entry point of every command: one line and a code, whatever happens."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from detrelay.apps import console
from detrelay.apps.cli import COMMANDS
from detrelay.apps.console import read_arguments
from detrelay.apps.train import Arguments
from detrelay.core.boxes import cxcywh_to_xyxy
from detrelay.core.errors import DataError, RecipeError


class Panic(BaseException):
    """As Rust libraries raise them."""


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise DataError("a.png: cannot be decoded")


def ended(
    main: Callable[[], object], capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str]:
    """Exit code and stderr of a command line that runs `main`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["detrelay", *words])
        with pytest.raises(SystemExit) as stop:
            console.run(main)  # type: ignore[arg-type]
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], object]:
    def main() -> object:
        raise error

    return main


def to_nobody() -> None:
    reader, writer = multiprocessing.Pipe(duplex=False)
    reader.close()
    writer.send("x")


def too_deep() -> object:
    return too_deep()


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (raising(RecipeError("two\nlines")), 2, "two lines"),
        (raising(ValueError("ours")), 2, "ours"),
        (raising(FileNotFoundError(2, "none", "x")), 2, "[Errno 2] none: 'x'"),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
        (raising(MemoryError()), 1, "out of memory (MemoryError); use smaller"),
        (to_nobody, 2, "[Errno 32] Broken pipe"),
        (raising(RuntimeError("x")), 1, "RuntimeError: x; raised in "),
        (raising(Panic("rust")), 1, "Panic: rust; raised in "),
        (too_deep, 1, "RecursionError: maximum recursion depth exceeded"),
        (lambda: json.loads("[" * 10**5), 1, "RecursionError: "),
        (lambda: float(10**400), 1, "OverflowError: int too large to convert to float"),
        (lambda: torch.empty(2**50), 1, "out of memory ("),
        (lambda: list(DataLoader(Broken(), num_workers=1)), 2, "a.png: cannot be decoded"),
        (lambda: json.loads("{"), 1, "JSONDecodeError: Expecting property name"),
        (
            lambda: cxcywh_to_xyxy(None),  # type: ignore[arg-type]
            1,
            "TypeError: 'NoneType' object is not subscriptable",
        ),
    ],
)
def test_every_error_ends_in_one_line_and_a_code(
    main: Callable[[], object], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, shown = ended(main, capsys)
    assert found == code
    assert shown.startswith(f"error: {said}")
    assert shown.count("\n") == 1
    assert len(shown) < 500


def test_faults_are_told_from_errors_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    advice = "this may be a fault of detrelay; run again with --debug\n"
    _, ours = ended(lambda: cxcywh_to_xyxy(None), capsys)  # type: ignore[arg-type]
    assert ours.endswith(advice)
    _, library = ended(lambda: json.loads("{"), capsys)
    assert library.endswith(advice)
    _, users = ended(raising(RuntimeError("x")), capsys)
    assert f"raised in {__file__}, line " in users
    assert advice not in users
    _, expected = ended(raising(RecipeError("x")), capsys)
    assert expected == "error: x\n"


def test_debug_shows_the_traceback_before_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = ended(raising(RecipeError("x")), capsys, "train", "--debug")
    assert code == 2
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.endswith("\nerror: x\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_stands_behind_the_door_and_takes_debug(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(f"detrelay.apps.{command.replace('-', '_')}")
    assert "debug" in {field.name for field in dataclasses.fields(module.Arguments)}

    def broken(kind: type) -> object:
        raise KeyError("a fault")

    monkeypatch.setattr(module, "read_arguments", broken)
    for words, begins in ((["detrelay"], "error: KeyError: "), (["x", "--debug"], "Traceback")):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            module.main()
        assert stop.value.code == 1
        assert capsys.readouterr().err.startswith(begins)


def test_nobody_is_told_to_unpickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch itself advises it, at length."""
    file = tmp_path / "a.pth"
    torch.save({"model": print}, file)
    _, shown = ended(lambda: torch.load(file, weights_only=True), capsys)
    assert "not a checkpoint of plain tensors" in shown
    assert "weights_only" not in shown
    file.write_bytes(pickle.dumps({"a": print}))
    _, shown = ended(lambda: torch.load(file, weights_only=True), capsys)
    assert "weights_only" not in shown


def test_names_that_the_terminal_cannot_show_end_nothing(tmp_path: Path) -> None:
    code = "from detrelay.apps import console\nconsole.run(lambda: print('\\u732b \\udcff') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"\\u732b \\udcff\n")


def test_the_code_of_the_command_is_the_code_of_the_process() -> None:
    with pytest.raises(SystemExit) as stop:
        console.run(lambda: 143)
    assert stop.value.code == 143


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from detrelay.apps import console\n"
    code += "console.run(lambda: print('x' * 10**6, flush=True) or 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize(
    ("words", "option"), [(["--output", ""], "--output"), (["--seed", "1", "--init="], "--init")]
)
def test_an_empty_argument_is_refused(
    words: list[str], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path it would be the working directory."""
    monkeypatch.setattr("sys.argv", ["detrelay train", *words])
    with pytest.raises(ValueError, match=f"an empty argument after {option}; give a value"):
        read_arguments(Arguments)
