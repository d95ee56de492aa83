from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from transformers import AutoModelForObjectDetection

from detrelay.core.backbones import ResNetBackbone, build_backbone
from detrelay.core.backbones.resnet import DeformableConv2d
from detrelay.heads import StageInteractorForObjectDetection
from factories import small_config


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (64, 128, 256, 512)), ("resnet50", (256, 512, 1024, 2048))],
)
def test_feature_maps(name: str, channels: tuple[int, ...]) -> None:
    backbone = ResNetBackbone(name, "eval", 1).eval()
    assert backbone.channels == channels
    assert backbone.strides == (4, 8, 16, 32)
    with torch.no_grad():
        levels = backbone(torch.zeros(1, 3, 65, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (channel, -(-65 // stride), 96 // stride)
        for channel, stride in zip(channels, backbone.strides, strict=True)
    ]


def test_features_equal_torchvision() -> None:
    network = torchvision.models.resnet18(weights=None).eval()
    backbone = ResNetBackbone("resnet18", "eval", 0).eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    backbone.load_state_dict(state)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        pooled = backbone(image)[-1].mean((2, 3))
        torch.testing.assert_close(network.fc(pooled), network(image))


def test_fewer_stages_leave_the_last_ones_out() -> None:
    backbone = ResNetBackbone("resnet18", "train", 0, num_stages=3)
    assert backbone.channels == (64, 128, 256)
    assert not [name for name, _ in backbone.named_parameters() if name.startswith("layer4")]


@pytest.mark.parametrize(
    ("norm", "frozen", "trained"),
    [
        ("eval", 1, {"layer2", "layer3", "layer4"}),
        ("eval", 0, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        ("train", 2, {"layer3", "layer4"}),
    ],
)
def test_frozen_stages(norm: str, frozen: int, trained: set[str]) -> None:
    backbone = ResNetBackbone("resnet18", norm, frozen)  # type: ignore[arg-type]
    names = {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert names == trained


def test_frozen_norms_train_neither_affine_nor_statistics() -> None:
    backbone = ResNetBackbone("resnet18", "frozen", 0).train()
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())
    assert not any(norm.training for norm in norms)
    assert backbone.conv1.weight.requires_grad


def test_trained_norms_update_but_not_in_frozen_stages() -> None:
    backbone = ResNetBackbone("resnet18", "train", 1).train()
    backbone(torch.randn(2, 3, 64, 64))
    assert backbone.bn1.running_mean.abs().sum() == 0
    assert backbone.layer2[0].bn1.running_mean.abs().sum() > 0


def test_statistics_survive_saving(tmp_path: Path) -> None:
    model = StageInteractorForObjectDetection(small_config())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for buffer, value in zip(module.buffers(), (0.5, 2, 3), strict=True):
                buffer.fill_(value)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_deformable_convolution_reads_where_its_offsets_point() -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False)
    moved = DeformableConv2d(conv)
    nn.init.zeros_(moved.conv_offset.weight)
    nn.init.zeros_(moved.conv_offset.bias)
    moved.weight.data = conv.weight.data
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(moved(x), conv(x), atol=1e-5, rtol=1e-5)
    # (dy, dx) = (1, 2) for all nine taps
    moved.conv_offset.bias.data = torch.tensor([1.0, 2.0]).repeat(9)
    shifted = F.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]
    inner = (slice(None), slice(None), slice(1, -2), slice(1, -3))
    torch.testing.assert_close(moved(x)[inner], conv(shifted)[inner], atol=1e-5, rtol=1e-5)
    half = moved.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_deformable_stages_start_as_ordinary_ones() -> None:
    with torch.device("meta"):
        backbone = build_backbone("resnext101_32x4d_dcn", "eval", 1)
    deformable = {n for n, m in backbone.named_modules() if isinstance(m, DeformableConv2d)}
    assert len(deformable) == 4 + 23 + 3
    assert not [name for name in deformable if not re.match(r"layer[234]\.\d+\.conv2$", name)]


def test_offsets_start_at_zero() -> None:
    backbone = ResNetBackbone("resnet18", "eval", 0)
    backbone.layer2[0].conv2 = DeformableConv2d(backbone.layer2[0].conv2)
    backbone.reset_parameters()
    conv = backbone.layer2[0].conv2
    assert conv.conv_offset.weight.abs().sum() == 0
    assert conv.conv_offset.bias.abs().sum() == 0
    assert conv.weight.abs().sum() > 0
