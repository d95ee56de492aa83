"""Convolution, norm and ReLU in one call: the same maps, from the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detrelay.core.backbones import build_backbone
from detrelay.core.backbones.base import Backbone
from detrelay.core.ops import folded_conv

# of the largest number of a map: what rounding in other places makes
TOLERANCE = 1e-5


def make(name: str, norm: Any = "eval", frozen: int = 1) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(name, norm, frozen)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return backbone.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The convolutions that went the short way."""
    seen: list[nn.Module] = []
    whole = folded_conv._folded

    def counted(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Any:
        seen.append(conv)
        return whole(conv, norm)

    monkeypatch.setattr(folded_conv, "_folded", counted)
    return seen


def plain(backbone: Backbone, pixels: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        maps: tuple[Tensor, ...] = backbone(pixels)
    return maps


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        largest = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * largest)


@pytest.mark.parametrize(("name", "convs"), [("resnet18", 20), ("resnet50", 53)])
def test_maps_are_those_of_the_modules(name: str, convs: int, calls: list[nn.Module]) -> None:
    backbone, pixels = make(name), torch.randn(2, 3, 65, 96)
    expected = plain(backbone, pixels)
    assert not calls
    with torch.no_grad():
        assert_close(backbone(pixels), expected)
    assert len(calls) == convs


def test_changed_weights_and_statistics_are_seen() -> None:
    backbone, pixels = make("resnet18"), torch.randn(1, 3, 64, 64)
    conv = backbone.get_submodule("layer3.0.conv1")
    norm = backbone.get_submodule("layer2.1.bn2")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    other = {name: value + 0.1 for name, value in backbone.state_dict().items()}

    def renew() -> None:
        conv.weight.data = conv.weight * 1.5

    changes: list[Callable[[], Any]] = [
        lambda: conv.weight.mul_(1.5),
        lambda: norm.running_var.mul_(2),  # type: ignore[union-attr]  # checked above
        renew,
        lambda: backbone.half().float(),
        lambda: backbone.load_state_dict(other, assign=True),
    ]
    with torch.no_grad():
        before = backbone(pixels)
        for change in changes:
            change()
            now = backbone(pixels)
            assert_close(now, plain(backbone, pixels))
            assert not torch.equal(now[-1], before[-1])
            before = now


@pytest.mark.parametrize(
    "prepare",
    [
        lambda backbone: backbone.double(),
        lambda backbone: backbone.get_submodule("layer2.0").register_forward_hook(lambda *_: None),
        lambda backbone: setattr(
            backbone.get_submodule("layer2.0"),
            "forward",
            backbone.get_submodule("layer2.0").forward,
        ),
    ],
    ids=["float64", "hook", "wrapped"],
)
def test_what_cannot_be_folded_runs_its_modules(
    prepare: Callable[[Backbone], Any], calls: list[nn.Module]
) -> None:
    backbone = make("resnet18")
    prepare(backbone)
    dtype = next(backbone.parameters()).dtype
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64, dtype=dtype))
    stage = set(backbone.get_submodule("layer2").modules())
    assert not stage & set(calls)
    assert bool(calls) == (dtype == torch.float32)


def test_only_frozen_stages_are_folded_while_the_rest_learns(calls: list[nn.Module]) -> None:
    backbone, pixels = make("resnet18", "train", frozen=1), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        backbone(pixels)
    assert folded_conv._known
    backbone.train()
    assert not any(module in folded_conv._known for module in backbone.modules())
    calls.clear()
    maps = backbone(pixels)
    frozen = {backbone.get_submodule("conv1"), *backbone.get_submodule("layer1").modules()}
    assert calls
    assert set(calls) <= frozen
    maps[-1].sum().backward()
    assert backbone.get_submodule("layer2.0.conv1").get_parameter("weight").grad is not None
