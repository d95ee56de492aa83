"""What `predict` writes: formats, chosen detections, batches, speed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detrelay.apps.writers import WRITERS
from factories_data import write_coco
from fixed_model import Fixed, rows, run


def test_all_formats_say_the_same(
    model: Fixed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_coco(tmp_path), tmp_path / "out"
    assert run(data=data, output=output, format=tuple(WRITERS)) == 0
    found = rows(output)
    first = found[0]
    assert (first["image_id"], first["file_name"], first["bbox"]) == (11, "a.png", [0, 0, 20, 30])
    with (output / "predictions.csv").open(newline="") as file:
        (row, *others) = csv.DictReader(file)
    assert row == {
        "file_name": "a.png", "image_id": "11", "frame": "", "time": "", "category_id": "7",
        "category": "cat", "score": str(first["score"]),
        "x": "0.0", "y": "0.0", "width": "20.0", "height": "30.0",
    }  # fmt: skip
    assert len(others) == len(found) - 1
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [11, 5, 8]
    assert (lines[0]["width"], lines[0]["height"]) == (40, 30)
    own = ("category_id", "bbox", "score", "category")
    assert lines[0]["objects"][0] == {key: first[key] for key in own}
    yolo = (output / "labels" / "a.txt").read_text().splitlines()
    score = f"{first['score']:.6f}"
    assert yolo[0] == f"0 0.250000 0.500000 0.500000 1.000000 {score}"
    assert (output / "classes.txt").read_text() == "cat\ndog\n"
    with Image.open(output / "crops" / "cat" / "a.png_0.png") as crop:
        assert crop.size == (20, 30)
        with Image.open(tmp_path / "images" / "a.png") as image:
            assert crop.tobytes() == image.convert("RGB").crop((0, 0, 20, 30)).tobytes()
    with Image.open(output / "crops" / "dog" / "a.png_1.png") as crop:
        assert crop.size == (12, 16)  # every pixel that the box touches
    assert not list(output.glob("*partial*"))


def test_an_image_without_detections_is_in_files_of_its_own(
    model: Fixed, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert run(input=photos, output=output, format=("jsonl", "yolo"), threshold=1.0) == 0
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["objects"] for line in lines] == [[], [], []]
    assert (output / "labels" / "b.txt").read_text() == ""
    assert not (output / "predictions.json").exists()


def test_one_bad_image_costs_its_batch_nothing(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = model.forward

    def spoil(pixel_values: torch.Tensor, **options: Any) -> Any:
        output = forward(pixel_values, **options)
        white = pixel_values.amin((1, 2, 3)) == 255
        output.logits = output.logits.masked_fill(white[:, None, None], float("nan"))
        return output

    model.forward = spoil  # type: ignore[method-assign]
    Image.new("RGB", (40, 30), "white").save(photos / "b.png")
    assert run(input=photos, output=tmp_path / "out", batch_size=3) == 1
    assert [row["file_name"] for row in rows(tmp_path / "out")[::2]] == ["a.png", "c.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "skipped b.png: the model's scores or boxes are not finite"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k must be at least 1, found 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, found 0"),
        ({"threads": -1}, "--threads must be at least 1, found -1"),
        ({"frame_step": 0}, "--frame-step must be at least 1, found 0"),
        ({"nms_iou_threshold": 1.5}, "--nms-iou-threshold must be between 0 and 1, found 1.5"),
        ({"format": ("coc",)}, "--format: unknown format coc; did you mean coco?"),
        ({"format": ("csv", "csv")}, "--format: expected one or several of coco, csv, jsonl"),
        ({"format": ()}, "--format: expected one or several of coco, csv, jsonl"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    model: Fixed, photos: Path, options: dict[str, Any], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(input=photos, output=photos / "out", **options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (photos / "out").exists()
