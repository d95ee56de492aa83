"""The command: options rejected first, bounds, and AP of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detrelay.apps import export as export_app
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.engine.checkpoint import save_model
from detrelay.core.export.detector import ExportedDetector
from detrelay.heads import HEADS
from factories import small_head_config
from factories_export import noise


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"precision": "float16"}, "--precision float16 needs --data"),
        ({"precision": "int8", "data": Path("x")}, "--precision int8 and --calibration go"),
        ({"calibration": Path("x")}, "--precision int8 and --calibration go"),
        ({"precision": "bfloat16", "data": Path("x")}, "onnx has no --precision bfloat16; it has"),
        ({"calibration_images": 0}, "--calibration-images must be at least 1, found 0"),
        ({"format": "torch-export", "with_processing": True}, "--with-processing goes with"),
    ],
)
def test_options_that_do_not_fit_are_refused_first(
    options: dict[str, Any], line: str, tmp_path: Path
) -> None:
    arguments = {"model": tmp_path / "none", "format": "onnx", "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=line):
        export_app.export(export_app.Arguments(**{**arguments, **options}))


def test_bounds_follow_the_precision(tmp_path: Path) -> None:
    arguments = {"model": tmp_path, "format": "onnx", "output": tmp_path}
    exact = export_app.bounds_of(export_app.Arguments(**arguments))
    assert (exact.logits, exact.boxes, exact.ap, exact.roundings) == (1e-3, 1e-4, 0.001, 2)
    strict = export_app.bounds_of(export_app.Arguments(**arguments, max_box_difference=1e-5))
    assert (strict.logits, strict.boxes, strict.roundings) == (1e-3, 1e-5, 0)
    named = export_app.Arguments(**arguments, precision="int8", max_box_difference=0.5)
    smaller = export_app.bounds_of(named)
    assert (smaller.logits, smaller.boxes, smaller.ap, smaller.roundings) == (None, 0.5, 0.003, 0)


@pytest.mark.slow
def test_the_command_measures_ap_of_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = {"id2label": {0: "a", 1: "b"}, "category_ids": [3, 7]}
    config = small_head_config(
        "deformable_detr_one_level", encoder_layers=1, decoder_layers=1, **classes
    )
    processor = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})  # type: ignore[arg-type]
    save_model(HEADS["deformable_detr"].model(config), processor, {}, tmp_path / "model")
    content: dict[str, Any] = {
        "images": [{"id": 4, "file_name": "4.png", "width": 70, "height": 50}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 7, "bbox": [20, 15, 30, 20], "area": 600}
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }
    Image.fromarray(noise(50, 70)).save(tmp_path / "4.png")
    (tmp_path / "val.json").write_text(json.dumps(content))
    arguments = export_app.Arguments(
        tmp_path / "model",
        "torch-export",
        tmp_path / "out",
        data=tmp_path / "val.json",
        images=tmp_path,
    )
    assert export_app.export(arguments) == 0
    assert "AP on val.json (1 images)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["differences"]) == 15
    assert abs(report["precision"]["file"] - report["precision"]["model"]) <= 0.001
    detector = ExportedDetector(tmp_path / "out")
    assert detector.category_ids == [3, 7]
    assert detector.class_names == ["a", "b"]
    assert len(detector(tmp_path / "4.png", 0.0, 5)[0]["scores"]) == 5
