"""Backbones of transformers, of timm and custom ones under a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForObjectDetection

from detrelay.core.backbones import build_backbone
from factories import make_targets
from factories_backbones import CASES, make_model


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name.startswith("timm"):
        pytest.importorskip("timm")
    return name


def test_channels_and_strides_are_those_of_the_maps(case: str) -> None:
    name, options, channels, strides = CASES[case]
    backbone = build_backbone(name, "eval", 0, options=options)
    assert backbone.channels == channels
    assert backbone.strides == strides
    side = 2 * backbone.divisor
    maps = backbone(torch.randn(1, 3, side, 2 * side))
    assert [tuple(level.shape[1:]) for level in maps] == [
        (channel, side / stride, 2 * side / stride)
        for channel, stride in zip(channels, strides, strict=True)
    ]
    last = build_backbone(name, "eval", 0, num_maps=2, options=options)
    assert (last.channels, last.strides) == (channels[-2:], strides[-2:])
    assert len(last(torch.randn(1, 3, side, side))) == 2


def test_a_head_learns_on_it_and_comes_back_from_a_folder(case: str, tmp_path: Path) -> None:
    model = make_model(case, "deformable_detr").train()
    pixels = torch.randn(2, 3, 50, 70)  # sides that no stride divides
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in [make_targets((2,))] * 2]
    model(pixels, labels=labels).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    assert any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in again.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)


def test_padding_within_the_model_does_not_change_the_unit_of_boxes() -> None:
    model = make_model("dinov2").eval()
    pixels = torch.randn(1, 3, 50, 70)
    padded = nn.functional.pad(pixels, (0, 14, 0, 6))
    mask = torch.zeros(1, 56, 84)
    mask[:, :50, :70] = 1
    with torch.no_grad():
        alone, inside = model(pixels), model(padded, mask)
    torch.testing.assert_close(alone.pred_boxes, inside.pred_boxes)


def test_frozen_stages_keep_their_weights_and_norms() -> None:
    options = CASES["resnet"][1]
    backbone = build_backbone("transformers/resnet", "train", 2, options=options).train()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(
        ("embedder" in name or "stages.0." in name or "stages.1." in name) == (name in frozen)
        for name, _ in backbone.named_parameters()
    )
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {n for n, value in backbone.named_buffers() if not torch.equal(value, before[n])}
    assert moved
    assert not any("embedder" in name or "stages.1." in name for name in moved)
    fixed = build_backbone("transformers/resnet", "frozen", 0, options=options).train()
    norms = [m for m in fixed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training or m.weight.requires_grad for m in norms)


def test_deformable_heads_read_a_plain_transformer() -> None:
    model = make_model("dinov2", "dino").eval()
    assert model.level_strides == (7, 14, 28, 56)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 60, 90)).logits.shape[-1] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_name": "transformers/convnet"}, "convnet"),
        ({"backbone_name": "transformer/convnext"}, "unknown backbone transformer/convnext"),
        ({"backbone_options": {"depth": 3}, "backbone_name": "resnet18"}, "has no options"),
        ({"backbone_frozen_stages": 9}, r"must lie in 0\.\.4 for transformers/resnet"),
        ({"backbone_name": "nowhere:Backbone"}, "No module named 'nowhere'"),
    ],
)
def test_what_does_not_exist_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make_model("resnet", **changes)
