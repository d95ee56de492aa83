"""Tracing a detector for any batch, height and width, and writing it in a format."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.export.runtimes import INPUTS, OUTPUTS, find_format, require

# sizes to trace with; none may be 1, and none may equal another
_TRACED = (2, 96, 128)


class _Plain(nn.Module):
    """A detector whose outputs are a tuple."""

    def __init__(self, model: DetectorForObjectDetection) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores and boxes of the last stage."""
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return output.logits, output.pred_boxes


def trace(model: DetectorForObjectDetection) -> torch.export.ExportedProgram:
    """The graph of a detector in evaluation, with symbols for batch, height and width.

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
        # otherwise branches for batches of one and sides of one cell would be fixed by the sizes
        with _config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
            return torch.export.export(
                _Plain(model),
                (pixels, mask),
                dynamic_shapes=({0: free, 2: free, 3: free}, {0: free, 1: free, 2: free}),
                strict=False,
            )
    finally:
        model.train(was_training)


def write(program: torch.export.ExportedProgram, name: str, folder: Path) -> dict[str, Any]:
    """Write a traced detector as the file of a format.

    Args:
        program: what `trace` gave.
        name: the format.
        folder: where the file goes, under the name that the format has.

    Returns:
        What is particular to the file, such as the opset of ONNX.

    Raises:
        ValueError: the format is unknown or a package is missing.
    """
    kind = find_format(name)
    require(name, (*kind.to_write, *kind.to_run))
    with warnings.catch_warnings(), redirect_stdout(StringIO()):  # exporters tell of their steps
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        return _WRITERS[name](program, folder / kind.file)


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> dict[str, Any]:
    written = torch.onnx.export(
        program,
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    assert written is not None
    written.save(file)
    return {"opset": written.model.opset_imports[""]}


def _write_openvino(program: torch.export.ExportedProgram, file: Path) -> dict[str, Any]:
    openvino = importlib.import_module("openvino")
    converted = openvino.convert_model(program)
    for port, label in zip(converted.inputs, INPUTS, strict=True):
        port.set_names({label})
    # by default weights would be rounded to half precision
    openvino.save_model(converted, str(file), compress_to_fp16=False)
    return {}


def _write_torch(program: torch.export.ExportedProgram, file: Path) -> dict[str, Any]:
    torch.export.save(program, str(file))
    return {}


_WRITERS: Mapping[str, Callable[[torch.export.ExportedProgram, Path], dict[str, Any]]] = (
    MappingProxyType(
        {"onnx": _write_onnx, "openvino": _write_openvino, "torch-export": _write_torch}
    )
)
