"""Command lines called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tyro

from detrelay.apps import console
from detrelay.apps.train import Arguments


def command(
    main: Callable[[object], int], kind: type, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as stop:
        console.run(lambda: main(tyro.cli(kind, args=[str(item) for item in arguments])))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def parsed(*arguments: str) -> Arguments:
    """Arguments of training as the command line gives them."""
    return tyro.cli(Arguments, args=list(arguments))
