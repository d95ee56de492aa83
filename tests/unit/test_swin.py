"""Swin transformers as backbones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForObjectDetection

from detrelay.core.backbones import SwinBackbone
from detrelay.heads import StageInteractorForObjectDetection
from factories import small_config
from factories_backbones import maps_of


@pytest.mark.usefixtures("_small_swin")
def test_swin_stages_maps_and_freezing() -> None:
    backbone = SwinBackbone("swin_t", 2, num_stages=3, num_maps=2, drop_path=0.2)
    assert (backbone.channels, backbone.strides) == ((32, 64), (8, 16))
    names = [n for n, p in backbone.named_parameters() if p.requires_grad]
    assert not [n for n in names if "embeddings" in n or "layers.0." in n or "layers.1." in n]
    assert [n for n in names if "layers.2." in n]
    levels = maps_of(backbone, torch.zeros(1, 3, 65, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [(32, 9, 12), (64, 5, 6)]
    chances = [float(re.sub(r"[^\d.]", "", str(module).split("=")[-1]))
               for module in backbone.modules() if "DropPath" in type(module).__name__]  # fmt: skip
    assert chances == pytest.approx([0.05, 0.1, 0.15, 0.2])


@pytest.mark.usefixtures("_small_swin")
def test_swin_in_a_saved_detector(tmp_path: Path) -> None:
    config = small_config(backbone_name="swin_t", backbone_drop_path=0.1)
    model = StageInteractorForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).logits, model(image).logits, atol=0, rtol=0)
