"""Exported files in half precision and 8 bits, and files that take images."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from detrelay.apps import export as export_app
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.engine.checkpoint import save_model
from detrelay.core.export import folder as export_folder
from detrelay.core.export import quantization
from detrelay.core.export.detector import ExportedDetector, Facts
from detrelay.core.export.folder import ExportRefused
from detrelay.core.export.pixels import PixelSettings
from detrelay.core.export.processing import add_processing, check_processing
from detrelay.core.export.quantization import Calibration, layers_by_part, part_of, quantize_parts
from detrelay.core.export.runtimes import open_file
from detrelay.core.export.writing import halve_weights, onnx_to_openvino, write_file
from detrelay.heads import HEADS
from factories import small_head_config
from factories_export import noise, write_constant, write_layers

PROCESSOR = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})  # type: ignore[arg-type]
PIXELS = PixelSettings.of(PROCESSOR)
FACTS = Facts("onnx", ["a", "b", "c", "d"], None, PIXELS)
IMAGES = [noise(70, 90, seed) for seed in range(4)]


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest listens to all loggers, and torch writes its graphs to one that has a listener."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


def open_with_processing(folder: Path, name: str) -> Any:
    if name == "onnx":
        session = onnxruntime.InferenceSession(folder / "with_processing.onnx")
        return lambda image: session.run(None, {"image": image})
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    file = str(folder / "with_processing.xml")
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda image: [compiled([image])[key] for key in ("scores", "labels", "boxes")]


# Slow: a process that ran several files in OpenVINO dies when a later test forks loaders.
OPENVINO = pytest.param("openvino", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["onnx", OPENVINO])
def test_a_file_with_processing_finds_what_the_folder_finds(name: str, tmp_path: Path) -> None:
    write_layers(tmp_path / "layers.onnx")
    Facts(name, ["a", "b", "c", "d"], None, PIXELS).write(tmp_path)
    write_file(tmp_path / "layers.onnx", name, tmp_path, processing=PIXELS)
    run = open_with_processing(tmp_path, name)
    detector = ExportedDetector(tmp_path)
    for shape in ((97, 161), (300, 17), (64, 96)):
        image = noise(*shape)
        scores, labels, boxes = run(image)
        expected = detector(image, 0.0)[0]
        assert len(scores) == len(expected["scores"]) == 32
        # pixels differ by a level of 256
        assert np.abs(scores - expected["scores"]).max() < 1e-3
        assert np.array_equal(labels, expected["labels"])
        assert np.abs(boxes - expected["boxes"]).max() < 1e-3 * max(shape)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 300, "longest_edge": 400}},
        {"size": {"height": 70, "width": 50}, "pad_size_divisor": 1},
        {"do_resize": False, "do_normalize": False},
    ],
)
def test_pixels_made_in_the_graph_are_those_of_the_image_processor(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    processor = DetrelayImageProcessor(**settings)
    write_constant(tmp_path)
    add_processing(tmp_path / "model.onnx", tmp_path / "joined.onnx", PixelSettings.of(processor))
    joined = onnx.load(tmp_path / "joined.onnx")
    inner = [onnx.ValueInfoProto(name=name) for name in ("pixel_values", "pixel_mask")]
    joined.graph.output.extend(inner)
    session = onnxruntime.InferenceSession(joined.SerializeToString())
    for image in (noise(97, 161), noise(200, 120)):
        wanted = processor(images=[image], return_tensors="pt")
        values, mask = session.run(["pixel_values", "pixel_mask"], {"image": image})
        assert np.array_equal(mask, wanted["pixel_mask"].numpy())
        level = 1 / 255 / 0.224 if processor.do_normalize else 1 / 255
        difference = np.abs(values - wanted["pixel_values"].numpy())
        assert difference.max() < 2 * level * 1.001  # both round between the passes
        assert difference.mean() < level / 20


def test_what_the_graph_cannot_do_is_refused() -> None:
    for settings, line in (
        ({"nms_iou_threshold": 0.5}, "nms_iou_threshold is not done inside the graph"),
        ({"resample": 3}, "the image processor has filter 3"),
    ):
        with pytest.raises(ValueError, match=line):
            check_processing(PixelSettings.of(DetrelayImageProcessor(**settings)))  # type: ignore[arg-type]


def test_half_precision_halves_the_file_only(tmp_path: Path) -> None:
    source, half = tmp_path / "model.onnx", tmp_path / "half.onnx"
    write_layers(source)
    halve_weights(source, half)
    assert half.stat().st_size < 0.75 * source.stat().st_size
    pixels, mask = np.ones((2, 3, 20, 30), np.float32), np.ones((2, 20, 30), np.int64)
    logits, _ = open_file("onnx", source)(pixels, mask)
    halved, _ = open_file("onnx", half)(pixels, mask)
    assert halved.dtype == np.float32
    assert 0 < np.abs(halved - logits).max() < 2e-3 * np.abs(logits).max()


@pytest.mark.slow
def test_openvino_computes_in_what_the_file_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layers(tmp_path / "layers.onnx")
    asked: list[str] = []
    compile_model = openvino.Core.compile_model

    def listen(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        asked.append(settings["INFERENCE_PRECISION_HINT"])
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", listen)
    for precision in ("float32", "float16", "bfloat16"):
        onnx_to_openvino(tmp_path / "layers.onnx", tmp_path / "model.xml", precision)
        open_file("openvino", tmp_path / "model.xml")
    assert asked == ["f32", "f32", "bf16"]


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("backbone.network.layer1.0.conv1", "backbone"),
        ("neck.maps.0", "neck"),
        ("head.encoder.layers.0.ffn.widen", "encoder"),
        ("head.stages.3.mixing.generator", "decoder"),
        ("head.stages.3.classify.out", "branches"),
        ("head.refine_proposals.layers.0", "branches"),
    ],
)
def test_a_module_belongs_to_a_part(path: str, part: str) -> None:
    assert part_of(path) == part


@pytest.mark.parametrize("name", ["onnx", OPENVINO])
def test_parts_that_cost_ap_stay_float(name: str, tmp_path: Path) -> None:
    write_layers(tmp_path / "float32.onnx")
    facts = Facts(name, ["a", "b", "c", "d"], None, PIXELS)
    found: list[Any] = []
    told = iter([0.5, 0.499, 0.4])

    def ap(results: Any) -> float:
        found.append(results)
        return next(told)

    calibration = Calibration(IMAGES, ap)
    target = tmp_path / "int8.onnx"
    trials = quantize_parts(tmp_path / "float32.onnx", target, facts, calibration, 0.003)
    assert [(trial.part, trial.layers, trial.kept) for trial in trials] == [
        ("float32", 2, True),
        ("backbone", 1, True),
        ("branches", 1, False),
    ]
    kinds = {node.op_type: node for node in onnx.load(target).graph.node}
    assert kinds["Conv"].input[0].startswith("pixel_values_Dequantize")
    assert kinds["MatMul"].input[0] == "means"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float32.onnx", "int8.onnx"]
    for float_, mixed in zip(found[0], found[1], strict=True):
        assert 0 < np.abs(float_["scores"] - mixed["scores"]).max() < 0.05


def test_int8_is_refused_where_every_part_costs_ap(tmp_path: Path) -> None:
    write_layers(tmp_path / "float32.onnx")
    told = iter([0.5, 0.2, 0.3])
    calibration = Calibration(IMAGES, lambda results: next(told))
    with pytest.raises(
        ValueError, match=r"no part .* 0.15 points .*backbone 20.00, branches 30.00"
    ):
        quantize_parts(tmp_path / "float32.onnx", tmp_path / "x.onnx", FACTS, calibration, 0.003)


def test_a_layer_that_does_not_say_where_it_comes_from_is_refused(tmp_path: Path) -> None:
    write_layers(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    del model.graph.node[0].metadata_props[:]
    with pytest.raises(ValueError, match="conv: does not say which module it comes from"):
        layers_by_part(model)


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
    assert (exact.logits, exact.boxes, exact.ap) == (1e-4, 1e-5, 0.001)
    named = export_app.Arguments(**arguments, precision="int8", max_box_difference=0.5)
    smaller = export_app.bounds_of(named)
    assert (smaller.logits, smaller.boxes, smaller.ap) == (None, 0.5, 0.003)


def annotate_by(model: Any, folder: Path, images: int) -> None:
    """A data set whose objects are what a model finds best in noise."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }
    for number in range(1, images + 1):
        image = Image.fromarray(noise(60, 80, number))
        image.save(folder / f"{number}.png")
        content["images"].append(
            {"id": number, "file_name": f"{number}.png", "width": 80, "height": 60}
        )
        with torch.no_grad():
            output = model(**PROCESSOR(images=[image], return_tensors="pt"))
        found = PROCESSOR.post_process_object_detection(output, 0.0, [(60, 80)], 4)[0]
        for label, box in zip(found["labels"].tolist(), found["boxes"].tolist(), strict=True):
            left, top, right, bottom = box
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": (3, 7)[label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                }
            )
    (folder / "val.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_a_bad_quantisation_is_refused_and_a_good_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = small_head_config(
        "deformable_detr_one_level",
        encoder_layers=1,
        decoder_layers=1,
        id2label={0: "a", 1: "b"},
        category_ids=[3, 7],
    )
    model = HEADS["deformable_detr"].model(config).eval()
    with torch.no_grad():
        for weight in model.head.parameters():  # boxes and scores that differ by query
            weight += 0.1 * torch.randn_like(weight)
    save_model(model, PROCESSOR, {}, tmp_path / "model")
    (tmp_path / "data").mkdir()
    annotate_by(model, tmp_path / "data", 6)
    arguments = export_app.Arguments(
        tmp_path / "model",
        "onnx",
        tmp_path / "good",
        data=tmp_path / "data/val.json",
        images=tmp_path / "data",
        precision="int8",
        calibration=tmp_path / "data/val.json",
        max_ap_difference=0.3,
        with_processing=True,
    )
    assert export_app.export(arguments) == 0
    report = json.loads((tmp_path / "good/report.json").read_text())
    assert report["precision"]["model"] > 0.9
    assert {trial["part"] for trial in report["trials"]} >= {"backbone", "neck", "decoder"}
    assert "| backbone |" in capsys.readouterr().out
    assert (tmp_path / "good/with_processing.onnx").is_file()

    def plant(base: Path, target: Path, facts: Any, calibration: Any, bound: float) -> Any:
        names = [name for part in layers_by_part(onnx.load(base)).values() for name in part]
        ranges = target.with_name("ranges.json")
        quantization.quantize(base, target, names, calibration, facts, ranges)
        ranges.unlink()
        broken = onnx.load(target)
        for weight in broken.graph.initializer:
            if weight.name.endswith("_scale"):
                values = onnx.numpy_helper.to_array(weight) / np.float32(8)
                weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(broken, target)
        return []

    monkeypatch.setattr(export_folder, "quantize_parts", plant)
    refused = r"differs from its model: AP by (1|0\.\d+) \(bound 0.3\)"
    with pytest.raises(ExportRefused, match=refused):
        export_app.export(export_app.Arguments(**{**vars(arguments), "output": tmp_path / "bad"}))
    assert not (tmp_path / "bad").exists()
