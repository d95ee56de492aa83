"""Exported folders: pixels, detections, refusals; most files are made in slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from detrelay.apps import export as export_app
from detrelay.core.data.decode import ImageError
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.errors import NonFiniteOutput
from detrelay.core.export import folder as export_folder
from detrelay.core.export.comparison import (
    Difference,
    compare,
    measure,
    rounding_of,
    shapes_of,
)
from detrelay.core.export.detections import detections_of
from detrelay.core.export.detector import ExportedDetector
from detrelay.core.export.folder import ExportRefused, export_detector
from detrelay.core.export.pixels import PixelSettings, prepare
from detrelay.core.export.report import Bounds, ExportReport, Precision
from detrelay.core.export.runtimes import open_file, require
from detrelay.core.export.writing import trace, write_file, write_onnx
from detrelay.heads import HEADS
from factories import SMALL_HEADS, small_config, small_head_config
from factories_export import CLASSES, QUERIES, constant_folder, noise, write_constant

ONE_LEVEL = 1 / 255 / 0.224  # of 256 brightnesses, after normalisation
BOUNDS = Bounds(1e-4, 1e-5, 0.001)


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return HEADS["stageinteractor"].model(small_config()).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 64, "longest_edge": 96}},
        {"size": {"shortest_edge": 300, "longest_edge": 400}, "resample": 3},
        {"size": {"height": 70, "width": 50}, "pad_size_divisor": 1},
        {"do_resize": False, "do_rescale": True, "do_normalize": False},
    ],
)
def test_pixels_are_those_of_the_image_processor(settings: dict[str, Any]) -> None:
    processor = DetrelayImageProcessor(**settings)
    images = [noise(97, 161), noise(200, 120, seed=1), noise(64, 96, seed=2)]
    wanted = processor(images=images, return_tensors="pt")
    values, mask = prepare(images, PixelSettings.of(processor))
    assert np.array_equal(mask, wanted["pixel_mask"].numpy())
    difference = np.abs(values - wanted["pixel_values"].numpy())
    levels = 2 if settings.get("resample") == 3 else 1  # bicubic, bilinear
    assert difference.max() < levels * ONE_LEVEL * 1.001
    assert difference.mean() < ONE_LEVEL / 50


@pytest.mark.parametrize("overlap", [None, 0.3, 0.0])
@pytest.mark.parametrize("clip", [True, False])
def test_detections_are_those_of_the_image_processor(overlap: float | None, clip: bool) -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 30, CLASSES), torch.rand(2, 30, 4)
    logits[0, :3] = 200.0  # scores of exactly 1 rank by their order
    processor = DetrelayImageProcessor(nms_iou_threshold=overlap)
    sizes = [(97, 161), (200, 120)]
    wanted = processor.post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), 0.2, sizes, 25, clip=clip
    )
    found = detections_of(
        logits.numpy(),
        boxes.numpy(),
        sizes,
        threshold=0.2,
        top_k=25,
        clip=clip,
        nms_iou_threshold=overlap,
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(ours["labels"], theirs["labels"].numpy())
        assert np.abs(ours["scores"] - theirs["scores"].numpy()).max() < 1e-6
        assert np.abs(ours["boxes"] - theirs["boxes"].numpy()).max() < 1e-4
        assert ours["scores"].dtype == ours["boxes"].dtype == np.float32


def test_detections_refuse_numbers_that_are_none() -> None:
    logits, boxes = np.full((1, 2, 3), np.nan, np.float32), np.ones((1, 2, 4), np.float32)
    with pytest.raises(NonFiniteOutput):
        detections_of(
            logits, boxes, [(4, 4)], threshold=0, top_k=1, clip=True, nms_iou_threshold=None
        )


def test_a_folder_runs_without_torch_and_transformers(tmp_path: Path) -> None:
    folder = constant_folder(tmp_path / "exported")
    Image.fromarray(noise(40, 60)).save(tmp_path / "image.png")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from detrelay.core.export.detector import ExportedDetector\n"
        f"detector = ExportedDetector({str(folder)!r}, threads=1)\n"
        f"found = detector({str(tmp_path / 'image.png')!r}, 0.1, 5)[0]\n"
        "print(len(found['boxes']), found['boxes'][0].tolist(), detector.category_ids)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "5 [15.0, 15.0, 45.0, 25.0] [1, 2, 5, 7]\n", done.stderr


def test_images_may_come_in_several_forms(tmp_path: Path) -> None:
    detector = ExportedDetector(constant_folder(tmp_path / "exported"))
    pixels = noise(40, 60)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    one = detector(pixels, 0.0, 3)
    for same in (Image.fromarray(pixels), str(tmp_path / "image.png"), tmp_path / "image.png"):
        assert np.array_equal(detector(same, 0.0, 3)[0]["scores"], one[0]["scores"])
    assert len(detector([pixels, Image.fromarray(pixels)])) == 2
    with pytest.raises(ValueError, match="no image"):
        detector([])
    with pytest.raises(TypeError, match="found float"):
        detector([3.0])  # type: ignore[list-item]
    with pytest.raises(ImageError, match="float64"):
        detector(pixels / 255)


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no exported detector \(it has no detector.json\)"):
        ExportedDetector(tmp_path)
    folder = constant_folder(tmp_path / "exported")
    with pytest.raises(ValueError, match="threads must be at least 1, found 0"):
        ExportedDetector(folder, threads=0)
    (folder / "model.onnx").write_bytes(b"not ONNX")
    with pytest.raises(ValueError, match=r"model.onnx: cannot be opened as onnx: ") as refused:
        ExportedDetector(folder)
    assert "\n" not in str(refused.value)
    (folder / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"model.onnx: missing; export the model again"):
        ExportedDetector(folder)
    facts = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(json.dumps({**facts, "format": "onyx"}))
    with pytest.raises(ValueError, match=r"unknown format onyx; did you mean onnx\?"):
        ExportedDetector(folder)
    (folder / "detector.json").write_text(json.dumps({**facts, "pixels": {"mean": 1}}))
    with pytest.raises(ValueError, match="not what `detrelay export` writes"):
        ExportedDetector(folder)


def test_what_numpy_cannot_repeat_is_refused() -> None:
    for settings in ({"do_pad": False}, {"do_center_crop": True, "crop_size": 5}):
        with pytest.raises(ValueError, match="of an image processor cannot be exported"):
            PixelSettings.of(DetrelayImageProcessor(**settings))  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime, .*pip install 'detrelay\[export\]'"):
        require("onnx", ("onnx", "onnxruntime"))


def test_differences_are_found_and_told(small: Any) -> None:
    def run(pixels: NDArray[Any], mask: NDArray[Any]) -> Any:
        with torch.no_grad():
            output = small(torch.from_numpy(pixels), torch.from_numpy(mask))
        boxes = output.pred_boxes.numpy().copy()
        boxes[-1, 0, 0] += 0.01 * (len(boxes) == 3)
        return output.logits.numpy(), boxes

    found = compare(small, run, [(64, 96), (50, 70)])
    assert [(d.batch, d.height, d.width) for d in found[2:4]] == [(3, 64, 96), (1, 50, 70)]
    assert [d.boxes > 0.009 for d in found] == [False, False, True] * 2
    assert max(d.logits for d in found) == 0
    times = measure(small, run, (64, 64), rounds=1)
    precision = Precision("val.json", 9, 0.5, 0.49, (-0.02, 0.0))
    report = ExportReport(
        "onnx", "model.onnx", 10, {"opset": 18}, {}, BOUNDS, found, times, precision
    )
    assert report.refusals() == ["boxes by 0.01 (bound 1e-05)", "AP by 0.01 (bound 0.001)"]
    assert "-1.00 [-2.00, +0.00]" in report.page()
    assert "| 3 | 64 | 96 |" in report.page()


def test_a_file_that_does_something_else_is_not_written(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})  # type: ignore[arg-type]
    monkeypatch.setattr(export_folder, "trace", lambda model: model)
    monkeypatch.setattr(export_folder, "shapes_of", lambda edge: [(64, 64)])

    def plant(model: Any, place: Path, *others: Any) -> Any:
        write_constant(place)
        return {}, []

    monkeypatch.setattr(export_folder, "_write", plant)
    monkeypatch.setattr(export_folder, "compare", lambda *a: compare(small, wrong, [(64, 64)]))
    monkeypatch.setattr(export_folder, "measure", lambda *a: measure(small, wrong, (64, 64), 1))
    target = tmp_path / "exported"
    with pytest.raises(ExportRefused, match=r"not written, .*logits by inf.*--keep-refused"):
        export_detector(small, processor, "onnx", target, BOUNDS)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ExportRefused, match=r"kept as .*exported.refused"):
        export_detector(small, processor, "onnx", target, BOUNDS, keep_refused=True)
    kept = tmp_path / "exported.refused"
    assert json.loads((kept / "report.json").read_text())["beyond_bounds"]
    assert "Beyond its bounds" in (kept / "report.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["exported.refused"]


def test_a_file_as_exact_as_its_model_is_written(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = rounding_of(small, [(64, 96)])
    assert 0 < own.logits < 1e-4
    assert 0 < own.boxes < 1e-5
    assert small.dtype == torch.float32
    processor = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})  # type: ignore[arg-type]
    monkeypatch.setattr(export_folder, "trace", lambda model: model)

    def plant(model: Any, place: Path, *others: Any) -> Any:
        write_constant(place)
        return {}, []

    monkeypatch.setattr(export_folder, "_write", plant)
    found = [Difference(1, 64, 64, 1.5 * own.logits, 1.5 * own.boxes)]
    monkeypatch.setattr(export_folder, "compare", lambda *a: found)
    monkeypatch.setattr(export_folder, "shapes_of", lambda edge: [(64, 96)])
    monkeypatch.setattr(export_folder, "measure", lambda *a: measure(small, wrong, (64, 64), 1))
    none = Bounds(0.0, 0.0, 0.001)
    with pytest.raises(ExportRefused, match="not written"):
        export_detector(small, processor, "onnx", tmp_path / "exported", none)
    wider = Bounds(0.0, 0.0, 0.001, roundings=2.0)
    report = export_detector(small, processor, "onnx", tmp_path / "exported", wider)
    assert report.rounding == own
    assert "2 times as much is allowed" in (tmp_path / "exported" / "report.md").read_text()


def wrong(pixels: NDArray[Any], mask: NDArray[Any]) -> Any:
    shape = (len(pixels), QUERIES, CLASSES)
    return np.full(shape, np.nan, np.float32), np.ones(shape, np.float32)


def test_models_that_are_not_ours_and_half_precision_are_refused(
    tmp_path: Path, small: Any
) -> None:
    arguments = export_app.Arguments(tmp_path / "none", "torch-export", tmp_path / "out")
    with pytest.raises(ValueError, match="no saved model"):
        export_app.export(arguments)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(ValueError, match=r"cannot be loaded as a model"):
        export_app.export(arguments)
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(ValueError, match="already exists"):
        export_app.export(export_app.Arguments(tmp_path, "onnx", full))
    with pytest.raises(ValueError, match="--max-box-difference must be at least 0, found -1"):
        export_app.export(
            export_app.Arguments(tmp_path, "onnx", tmp_path / "x", max_box_difference=-1)
        )
    half = HEADS["stageinteractor"].model(small_config()).half()
    with pytest.raises(ValueError, match=r"only models in float32 are exported, found torch.float"):
        trace(half)


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL_HEADS)
def test_every_head_is_the_same_in_both_runtimes(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HEADS[SMALL_HEADS[case][0]].model(small_head_config(case)).eval()
    with torch.no_grad():
        for weight in model.head.parameters():  # away from zeros, with which heads begin
            weight += 0.03 * torch.randn_like(weight)
    assert write_onnx(trace(model), tmp_path / "model.onnx")["opset"] >= 18
    write_file(tmp_path / "model.onnx", "openvino", tmp_path)
    for name, file in (("onnx", "model.onnx"), ("openvino", "model.xml")):
        run = open_file(name, tmp_path / file, threads=1)
        differences = compare(model, run, shapes_of(128))
        assert len(differences) == 15
        assert max(found.logits for found in differences) < 1e-4, name
        assert max(found.boxes for found in differences) < 1e-5, name
