"""What `predict` writes: formats, chosen detections, batches, speed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detrelay.apps.detector import Choice, Detector
from detrelay.apps.writers import WRITERS
from detrelay.core.data.image_processing import DetrelayImageProcessor
from factories_data import noise_image, write_coco
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


def test_rows_are_there_while_the_others_are_waited_for(
    model: Fixed, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    growing = []

    def look(count: int) -> None:
        for name in ("predictions.csv.partial", "predictions.jsonl.partial"):
            growing.append(len((output / name).read_text().splitlines()))

    model.before = look
    assert run(input=photos, output=output, format=("csv", "jsonl")) == 0
    assert growing == [1, 0, 3, 1, 5, 2]


def test_yolo_files_of_equal_names_are_refused(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_image(40, 30).save(photos / "a.jpg")
    assert run(input=photos, output=tmp_path / "out", format=("coco", "drawings")) == 0
    assert run(input=photos, output=tmp_path / "two", format=("yolo",)) == 2
    assert "(a.jpg, a.png), and would both be written to" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_classes_and_number_of_detections_are_chosen(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = photos / "a.png"
    assert run(input=one, output=tmp_path / "best", top_k=1) == 0
    assert [row["category"] for row in rows(tmp_path / "best")] == ["cat"]
    # the better cat takes no place from the dog
    assert run(input=one, output=tmp_path / "dogs", top_k=1, classes=("dog",)) == 0
    (dog,) = rows(tmp_path / "dogs")
    assert (dog["category"], dog["category_id"], dog["bbox"][2]) == ("dog", 3, pytest.approx(12))
    assert run(input=one, output=tmp_path / "none", classes=("dgo",)) == 2
    assert "--classes: unknown class dgo; did you mean dog?" in capsys.readouterr().err


def test_suppression_is_chosen(photos: Path) -> None:
    class Doubled(Fixed):
        """Finds its first object twice, a little apart."""

        def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
            output = super().forward(pixel_values)
            output.logits = output.logits[:, [0, 0]]
            shift = torch.tensor([[0.0, 0, 0, 0], [0.01, 0, 0, 0]])
            output.pred_boxes = output.pred_boxes[:, [0, 0]] + shift
            return output

    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    counts = []
    for overlap in (None, 0.99, 0.5):
        processor = DetrelayImageProcessor(do_resize=False, do_pad=False)
        detector = Detector(Doubled(), processor, Choice(nms_iou_threshold=overlap))  # type: ignore[arg-type]
        counts.append(len(detector([image])[0]["scores"]))
    assert counts == [2, 2, 1]


def test_batches_join_images_of_one_size_and_change_nothing(
    model: Fixed, photos: Path, tmp_path: Path
) -> None:
    noise_image(24, 30).save(photos / "b2.png")
    assert run(input=photos, output=tmp_path / "one") == 0
    assert model.batches == [1, 1, 1, 1]
    model.batches.clear()
    assert run(input=photos, output=tmp_path / "three", batch_size=3) == 0
    assert model.batches == [2, 1, 1]
    assert rows(tmp_path / "one") == rows(tmp_path / "three")


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


def test_speed_is_told(
    model: Fixed, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(input=photos, output=tmp_path / "out") == 0
    *_, last = capsys.readouterr().out.splitlines()
    pattern = r"\d+\.\d images/s \(reading \d+\.\d s, detecting \d+\.\d s, writing \d+\.\d s\) -> "
    assert re.match(pattern, last), last
    assert not last.startswith("0.0 ")


def test_device_dtype_and_threads_are_chosen(
    model: Fixed, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    one = photos / "a.png"
    options = {"device": "cpu", "dtype": "bfloat16", "threads": 3}
    assert run(input=one, output=tmp_path / "out", **options) == 0
    assert asked == [3]
    assert model.weight.dtype == torch.bfloat16
    assert len(rows(tmp_path / "out")) == 2
    for device in ("cuda:9", "gpu"):
        assert run(input=one, output=tmp_path / "out", device=device) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --device {device}: not to be used here: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top-k must be at least 1, found 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1, found 0"),
        ({"threads": -1}, "--threads must be at least 1, found -1"),
        ({"frame_step": 0}, "--frame-step must be at least 1, found 0"),
        ({"nms_iou_threshold": 1.5}, "--nms-iou-threshold must lie between 0 and 1, found 1.5"),
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
