"""Files of each format: any size, half precision, and the precision to compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

from detrelay.core.export.comparison import compare, shapes_of
from detrelay.core.export.runtimes import open_file
from detrelay.core.export.writing import (
    halve_weights,
    onnx_to_openvino,
    trace,
)
from detrelay.heads import HEADS
from factories import small_head_config
from factories_export import (
    write_layers,
)


def test_a_traced_head_takes_any_size(tmp_path: Path) -> None:
    """The smallest; all heads and runtimes are in test_export_folder.py."""
    torch.manual_seed(0)
    config = small_head_config("deformable_detr_one_level", encoder_layers=1, decoder_layers=1)
    model = HEADS["deformable_detr"].model(config).eval()
    torch.export.save(trace(model), str(tmp_path / "model.pt2"))
    run = open_file("torch-export", tmp_path / "model.pt2", threads=1)
    for found in compare(model, run, shapes_of(96)):
        assert found.logits < 1e-5
        assert found.boxes < 1e-6


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
