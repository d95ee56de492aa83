"""A folder as they are: many images, some of which cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from commands import command
from detrelay.apps import predict
from factories_data import noise_image
from factories_images import saved
from hub_model import small_model, write_run
from tiny_run import shrink_backbone

COUNT = 500


@pytest.mark.slow
def test_five_hundred_images_of_which_four_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four lines, one exit code; a folder that is called like an image is none."""
    shrink_backbone(monkeypatch)
    model = write_run(tmp_path / "run", small_model())
    photos = tmp_path / "photos"
    photos.mkdir()
    good = [saved(noise_image(64, 48, seed), "JPEG") for seed in range(10)]
    for number in range(COUNT):
        (photos / f"{number:03d}.jpg").write_bytes(good[number % len(good)])
    (photos / "007.jpg").write_bytes(good[7][: len(good[7]) // 2])
    (photos / "100.jpg").write_text("no image")
    (photos / "250.jpg").write_bytes(b"")
    (photos / "499.jpg").write_bytes(saved(Image.new("1", (30_000, 30_000)), "PNG"))
    (photos / "album.jpg").mkdir()
    code, out, err = command(
        predict.predict, predict.Arguments, capsys,
        *("--model", model, "--input", photos, "--output", tmp_path / "out"),
        *("--threshold", "0", "--top-k", "3", "--batch-size", "16"),
        *("--format", "coco", "jsonl", "yolo"),
    )  # fmt: skip
    assert code == 1
    skipped = [line for line in err.splitlines() if line.startswith("skipped ")]
    assert [line.partition(": ")[0] for line in skipped] == [
        f"skipped {name}.jpg" for name in ("007", "100", "250", "499")
    ]
    assert "left out: 1 folders" in err.splitlines()
    assert "1488 objects in 496 images, 4 images skipped" in out
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    names = [json.loads(line)["file_name"] for line in lines]
    assert len(names) == 496
    assert names == sorted(names)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {row["file_name"] for row in rows} == set(names)
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 496
