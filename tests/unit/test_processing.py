"""Files that take an image and give detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.export.detector import ExportedDetector, Facts
from detrelay.core.export.pixels import PixelSettings
from detrelay.core.export.processing import add_processing, check_processing
from detrelay.core.export.writing import write_file
from factories_export import OPENVINO, PIXELS, noise, write_constant, write_layers


def open_with_processing(folder: Path, name: str) -> Any:
    if name == "onnx":
        session = onnxruntime.InferenceSession(folder / "with_processing.onnx")
        return lambda image: session.run(None, {"image": image})
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    file = str(folder / "with_processing.xml")
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda image: [compiled([image])[key] for key in ("scores", "labels", "boxes")]


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
