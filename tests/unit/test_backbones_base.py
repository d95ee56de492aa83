"""Custom backbones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection

from detrelay.core.backbones import Backbone, BackboneSettings
from detrelay.core.backbones.base import stage_maps
from factories_backbones import make_model


def test_a_backbone_of_ones_own_is_found_by_module_and_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halves(Backbone):
        def __init__(self, name: str, settings: BackboneSettings) -> None:
            width = settings.options["width"]
            super().__init__(name, (width, width), (4, 8))
            self.first = nn.Conv2d(3, width, 4, stride=4)
            self.second = nn.Conv2d(width, width, 2, stride=2)

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first = self.first(pixel_values)
            return first, self.second(first)

    module = type(sys)("my_backbone")
    module.Halves = Halves  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_backbone", module)
    model = make_model(
        "resnet", backbone_name="my_backbone:Halves", backbone_options={"width": 8}, num_levels=2
    ).eval()
    assert model.level_strides == (4, 8)
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 64, 64)).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(torch.ones(1, 3, 64, 64)).logits, expected)


def test_maps_are_those_of_the_last_stages() -> None:
    assert stage_maps((8, 16, 32), None) == ((8, 16, 32), (4, 8, 16))
    assert stage_maps((8, 16, 32), 2) == ((16, 32), (8, 16))


def test_a_backbone_loads_no_weights_unless_it_says_how() -> None:
    with pytest.raises(ValueError, match=r"imagenet: mine has no pre-trained weights; set train"):
        Backbone("mine", (8,), (4,)).load_pretrained("imagenet")
