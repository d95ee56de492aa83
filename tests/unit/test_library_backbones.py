"""Backbones of transformers, of timm and of one's own under a head."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModelForObjectDetection

from detrelay.core.backbones import Backbone, BackboneSettings, build_backbone
from detrelay.core.backbones.weights import load_backbone_weights
from detrelay.core.detector.checkpointing import repeated_layers
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.heads import HEADS
from factories import make_targets, small_head_config

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# options of small networks, channels and strides of their maps
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[float, ...]]] = {
    "resnet": (
        "transformers/resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        (8, 16, 24, 32),
        (4, 8, 16, 32),
    ),
    "convnext": (
        "transformers/convnext",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        (8, 16, 24, 32),
        (4, 8, 16, 32),
    ),
    "swin": (
        "transformers/swin",
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4},
        (8, 16, 32, 64),
        (4, 8, 16, 32),
    ),
    "dinov2": (
        "transformers/dinov2",
        {**_VIT, "patch_size": 14},
        (8, 16, 32, 32),
        (3.5, 7, 14, 28),
    ),
    "dinov3": (
        "transformers/dinov3_vit",
        {**_VIT, "intermediate_size": 48, "patch_size": 16},
        (8, 16, 32, 32),
        (4, 8, 16, 32),
    ),
    "timm_resnet": ("timm/resnet10t", {}, (64, 128, 256, 512), (4, 8, 16, 32)),
    "timm_vit": (
        "timm/vit_tiny_patch16_224",
        {"depth": 2, "embed_dim": 32, "num_heads": 2},
        (8, 16, 32, 32),
        (4, 8, 16, 32),
    ),
    "timm_swin": (
        "timm/swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
        (8, 16, 32, 64),
        (4, 8, 16, 32),
    ),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name.startswith("timm"):
        pytest.importorskip("timm")
    return name


def make_model(
    case: str, head: str = "stageinteractor", **changes: Any
) -> DetectorForObjectDetection:
    name, options, _, _ = CASES[case]
    torch.manual_seed(0)
    changes = {"backbone_name": name, "backbone_options": options, **changes}
    return HEADS[head].model(small_head_config(head, **changes))


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


def test_timm_reads_a_file_of_its_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    theirs = timm.create_model("resnet10t")
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    backbone = build_backbone("timm/resnet10t", "eval", 0)
    load_backbone_weights(backbone, str(tmp_path / "weights.safetensors"))
    ours = backbone.get_parameter("network.layer2.0.conv1.weight")
    assert torch.equal(ours, theirs.layer2[0].conv1.weight)


def test_layers_that_repeat_are_found_for_checkpointing() -> None:
    kinds = {type(layer).__name__ for layer in repeated_layers(make_model("swin"))}
    assert kinds == {"SwinLayer", "StageInteractorStage"}


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
