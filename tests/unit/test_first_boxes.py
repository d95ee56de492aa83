"""Time to first boxes: what is measured, and how it is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import first_boxes
from first_boxes import Arguments, measure
from hub_model import small_model, write_run


def test_medians_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[dict[str, Any]] = [
        {"seconds to first boxes": seconds, "device": "CPU"} for seconds in (9.0, 2.004, 3.0)
    ]
    monkeypatch.setattr(first_boxes, "run_process", lambda arguments: runs.pop())
    assert measure(Arguments("model", output=tmp_path / "speed.json")) == 0
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert figures == {"seconds to first boxes": 3.0, "device": "CPU"}
    assert "seconds to first boxes      3.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--repeats must be at least 1, found 0"):
        measure(Arguments("model", repeats=0))


def test_an_error_in_the_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_boxes, "_PROCESS", "import sys; sys.exit('no config in nowhere')")
    with pytest.raises(ValueError, match=r"^nowhere: no config in nowhere$"):
        measure(Arguments("nowhere", repeats=1))


@pytest.mark.slow
def test_a_fresh_process_is_measured(tmp_path: Path) -> None:
    best = write_run(tmp_path / "run", small_model())
    arguments = Arguments(str(best), repeats=1, output=best / "speed.json")
    assert measure(arguments) == 0
    figures = json.loads((best / "speed.json").read_text())
    parts = [value for name, value in figures.items() if name.startswith("of these")]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(figures["seconds to first boxes"], abs=0.1)
    assert figures["image"] == "640 x 480 pixels"
