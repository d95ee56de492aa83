"""The program: it lists its commands and dispatches to them."""

from __future__ import annotations

import sys

import pytest

from detrelay.apps import cli


def test_the_program_lists_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrelay"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(f"\n  {name.replace('_', '-')} " in shown for name in cli.COMMANDS)


def test_the_program_hands_on_the_arguments_of_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrelay", "evaluate", "--data", "val.json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: name either --model or --predictions\n"


def test_an_unknown_command_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrelay", "trian"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "unknown command trian; did you mean train?" in capsys.readouterr().err
