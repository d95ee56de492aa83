"""The time of each part of a job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fixed_model import Fixed, run


def test_speed_is_told(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(input=photos, output=tmp_path / "out") == 0
    *_, last = capsys.readouterr().out.splitlines()
    pattern = r"\d+\.\d images/s \(reading \d+\.\d s, detecting \d+\.\d s, writing \d+\.\d s\) -> "
    assert re.match(pattern, last), last
    assert not last.startswith("0.0 ")
