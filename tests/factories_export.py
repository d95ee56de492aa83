"""Small exported files, made without a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.export.detector import Facts
from detrelay.core.export.pixels import PixelSettings

QUERIES, CLASSES = 8, 4
PROCESSOR = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})  # type: ignore[arg-type]
PIXELS = PixelSettings.of(PROCESSOR)
# Slow: a process that ran several files in OpenVINO dies when a later test forks loaders.
OPENVINO = pytest.param("openvino", marks=pytest.mark.slow)


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blurred noise: what resizing does to it shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_constant(folder: Path, offset: float = 0.0) -> None:
    """An ONNX file whose logits are the mean of the pixels, and whose boxes are alike."""
    helper = onnx.helper
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Squeeze", ["mean", "last"], ["flat"]),
        helper.make_node("Expand", ["flat", "logits_shape"], ["logits_1"]),
        helper.make_node("Add", ["logits_1", "offset"], ["logits"]),
        helper.make_node("Mul", ["flat", "zero"], ["none"]),
        helper.make_node("Add", ["none", "box"], ["boxes"]),
        helper.make_node("Expand", ["boxes", "boxes_shape"], ["pred_boxes"]),
    ]
    numbers = {
        "last": np.array([3]),
        "logits_shape": np.array([1, QUERIES, CLASSES]),
        "boxes_shape": np.array([1, QUERIES, 4]),
        "offset": np.array(offset, dtype=np.float32),
        "zero": np.array(0, dtype=np.float32),
        "box": np.array([0.5, 0.5, 0.5, 0.25], dtype=np.float32),
    }
    _save(nodes, numbers, folder / "model.onnx", opset=17, ir_version=9)


def _save(
    nodes: list[Any], numbers: dict[str, Any], file: Path, *, opset: int, ir_version: int
) -> None:
    """Write nodes between the inputs and outputs of a detector."""
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        nodes,
        "detector",
        [
            helper.make_tensor_value_info("pixel_values", kinds.FLOAT, ["b", 3, "h", "w"]),
            helper.make_tensor_value_info("pixel_mask", kinds.INT64, ["b", "h", "w"]),
        ],
        [
            helper.make_tensor_value_info("logits", kinds.FLOAT, ["b", QUERIES, CLASSES]),
            helper.make_tensor_value_info("pred_boxes", kinds.FLOAT, ["b", QUERIES, 4]),
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), file)


def constant_folder(folder: Path, **settings: Any) -> Path:
    processor = DetrelayImageProcessor(
        **{"size": {"shortest_edge": 64, "longest_edge": 96}, **settings}
    )
    folder.mkdir(exist_ok=True)
    write_constant(folder)
    names = [f"class {index}" for index in range(CLASSES)]
    Facts("onnx", names, [1, 2, 5, 7], PixelSettings.of(processor)).write(folder)
    processor.save_pretrained(folder)
    return folder


def write_layers(file: Path) -> None:
    """An ONNX file with a convolution of the backbone and a linear map of a class branch."""
    helper = onnx.helper
    generator = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["maps"], "conv"),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("ReduceMean", ["active"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["flat"], "linear"),
        helper.make_node("Reshape", ["flat", "shape"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["pred_boxes"]),
    ]
    for node, scope in ((nodes[0], "backbone.stem"), (nodes[3], "head.classify.0")):
        entry = node.metadata_props.add()
        entry.key = "pkg.torch.onnx.name_scopes"
        entry.value = str(["", "model", f"model.{scope.split('.')[0]}", f"model.{scope}", "conv2d"])
    weights = {
        "kernel": generator.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "weight": 0.2 * generator.standard_normal((16, QUERIES * CLASSES), dtype=np.float32),
        "shape": np.array([-1, QUERIES, CLASSES]),
    }
    _save(nodes, weights, file, opset=17, ir_version=10)
