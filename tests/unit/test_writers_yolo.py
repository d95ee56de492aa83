"""Text files in YOLO's format."""

from __future__ import annotations

from pathlib import Path

import pytest

from factories_data import noise_image
from fixed_model import Fixed, run


def test_yolo_files_of_equal_names_are_refused(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_image(40, 30).save(photos / "a.jpg")
    assert run(input=photos, output=tmp_path / "out", format=("coco", "drawings")) == 0
    assert run(input=photos, output=tmp_path / "two", format=("yolo",)) == 2
    assert "(a.jpg, a.png), and would both be written to" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
