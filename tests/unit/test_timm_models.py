"""Backbones of timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detrelay.core.backbones import build_backbone
from detrelay.core.backbones.weights import load_backbone_weights


def test_timm_reads_a_file_of_its_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    theirs = timm.create_model("resnet10t")
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    backbone = build_backbone("timm/resnet10t", "eval", 0)
    load_backbone_weights(backbone, str(tmp_path / "weights.safetensors"))
    ours = backbone.get_parameter("network.layer2.0.conv1.weight")
    assert torch.equal(ours, theirs.layer2[0].conv1.weight)
