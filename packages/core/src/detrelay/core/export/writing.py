"""Trace a detector for any batch, height and width, and write it in a format."""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.export.chunks import sum_in_chunks
from detrelay.core.export.pixels import PixelSettings
from detrelay.core.export.processing import NAME as WITH_PROCESSING
from detrelay.core.export.processing import add_processing
from detrelay.core.export.runtimes import COMPUTED_IN, INPUTS, OUTPUTS, find_format

# sizes to trace with; none may be 1, and all must differ
_TRACED = (2, 96, 128)
_WORTH_HALVING = 64  # elements; smaller weights stay in float32


class _Plain(nn.Module):
    """A detector whose outputs form a tuple."""

    def __init__(self, model: DetectorForObjectDetection) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and boxes of the last stage."""
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return output.logits, output.pred_boxes


def trace(model: DetectorForObjectDetection) -> torch.export.ExportedProgram:
    """The graph of a detector in evaluation mode, with symbolic batch, height and width.

    Args:
        model: in float32, on the CPU.

    Raises:
        ValueError: the model is in another dtype.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"only models in float32 are exported, found {model.dtype}")
    from torch.fx.experimental import _config

    batch, height, width = _TRACED
    pixels = torch.zeros(batch, 3, height, width)
    mask = torch.ones(batch, height, width, dtype=torch.int64)
    free = torch.export.Dim.DYNAMIC
    was_training = model.training
    model.eval()
    try:
        # otherwise branches for batches of one and sides of one cell would be specialised
        with _config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
            return torch.export.export(
                _Plain(model),
                (pixels, mask),
                dynamic_shapes=({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free}),
                strict=False,
            )
    finally:
        model.train(was_training)


def write_file(
    source: Path,
    name: str,
    folder: Path,
    precision: str = "float32",
    processing: PixelSettings | None = None,
) -> None:
    """Write the file of a format.

    Args:
        source: the detector as an ONNX file, in float32 or with 8-bit layers.
        name: the format.
        folder: where the file goes, under the file name of the format.
        precision: of the file, one of `Format.precisions`.
        processing: also write a second file with this image processing in its graph, see
            `add_processing`.
    """
    halved = folder / "halved.onnx"
    joined = folder / "joined.onnx"
    try:
        if precision == "float16":
            halve_weights(source, halved)
            source = halved
        _as_format(source, name, folder / find_format(name).file, precision)
        if processing is not None:
            add_processing(source, joined, processing)
            suffix = find_format(name).file.removeprefix("model")
            _as_format(joined, name, folder / f"{WITH_PROCESSING}{suffix}", precision)
    finally:
        halved.unlink(missing_ok=True)
        joined.unlink(missing_ok=True)


def _as_format(source: Path, name: str, target: Path, precision: str) -> None:
    if name == "openvino":
        onnx_to_openvino(source, target, precision)
    else:
        target.write_bytes(source.read_bytes())


def write_onnx(program: torch.export.ExportedProgram, file: Path) -> dict[str, Any]:
    """Write a traced detector as an ONNX file in float32; returns its opset."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):  # exporters print their steps
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        written = torch.onnx.export(
            program,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
    assert written is not None
    model = written.model_proto
    sum_in_chunks(model)
    importlib.import_module("onnx").save(model, file)
    return {"opset": written.model.opset_imports[""]}


def halve_weights(source: Path, target: Path) -> None:
    """Write an ONNX file whose weights are rounded to half precision and computed in float32.

    Runtimes convert them back when they open the file, which is as fast as before and half as
    large.

    Args:
        source: the float32 file.
        target: the file to write.

    Raises:
        ValueError: a weight is beyond the range of half precision.
    """
    onnx = importlib.import_module("onnx")
    model = onnx.load(source)
    casts = []
    for weight in model.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or math.prod(weight.dims) < _WORTH_HALVING:
            continue
        values = onnx.numpy_helper.to_array(weight)
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ValueError(f"{weight.name}: beyond the range of half precision; keep float32")
        name = weight.name
        weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        cast = onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT)
        casts.append(cast)
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    onnx.save(model, target)


def onnx_to_openvino(source: Path, target: Path, precision: str = "float32") -> None:
    """Convert an ONNX file to OpenVINO's own files.

    OpenVINO reads torch graphs too, but not all of ours: it supports neither the remainder nor the
    minimum of symbolic sizes.

    Args:
        source: the ONNX file.
        target: `model.xml`; the weights are stored next to it.
        precision: float16 rounds the weights; bfloat16 is recorded in the file as the precision to
            compute in.
    """
    openvino = importlib.import_module("openvino")
    converted = openvino.convert_model(str(source))
    if precision == "bfloat16":
        converted.set_rt_info("bf16", list(COMPUTED_IN))
    # by default weights would be rounded to half precision
    openvino.save_model(converted, str(target), compress_to_fp16=precision == "float16")
