"""Which detections are kept, in which batches, on which device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detrelay.apps.detector import Choice, Detector
from detrelay.core.data.image_processing import DetrelayImageProcessor
from factories_data import noise_image
from fixed_model import Fixed, rows, run


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
        assert line.startswith(f"error: --device {device}: not available: ")
