"""Backbones of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoBackbone, AutoConfig

from detrelay.core.backbones import build_backbone
from detrelay.core.backbones.weights import load_backbone_weights
from factories_backbones import CASES


def test_pretrained_weights_come_from_a_folder_of_the_same_network(tmp_path: Path) -> None:
    name, options, _, _ = CASES["convnext"]
    config = AutoConfig.for_model("convnext", **options)
    theirs = AutoBackbone.from_config(config)
    theirs.save_pretrained(tmp_path / "same")
    backbone = build_backbone(name, "eval", 0, options=options)
    load_backbone_weights(backbone, str(tmp_path / "same"))
    key = "encoder.stages.2.layers.0.dwconv.weight"
    assert torch.equal(backbone.get_parameter(f"network.{key}"), theirs.get_parameter(key))
    other = AutoConfig.for_model("convnext", **{**options, "hidden_sizes": [8, 16, 24, 40]})
    AutoBackbone.from_config(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"not the weights of a transformers/convnext"):
        load_backbone_weights(backbone, str(tmp_path / "other"))
