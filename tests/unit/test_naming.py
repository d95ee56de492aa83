"""Names of backbone weights in other projects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from detrelay.core.backbones import SwinBackbone
from detrelay.core.backbones.naming import NAMINGS, find_naming
from detrelay.core.backbones.weights import load_backbone_weights
from factories_backbones import SMALL_SWIN, SWIN_IMAGE, maps_of


def torchvision_swin() -> SwinTransformer:
    torch.manual_seed(1)
    network = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=SMALL_SWIN.width,
        depths=list(SMALL_SWIN.depths),
        num_heads=list(SMALL_SWIN.num_heads),
        window_size=[SMALL_SWIN.window] * 2,
        stochastic_depth_prob=0,
        num_classes=3,
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return network.eval()


def torchvision_maps(network: SwinTransformer, image: Tensor) -> list[Tensor]:
    """Its stages' results under norms without weights."""
    maps = []
    for index, part in enumerate(network.features):
        image = part(image)
        if index % 2:
            maps.append(F.layer_norm(image, image.shape[-1:]).permute(0, 3, 1, 2))
    return maps


@pytest.mark.usefixtures("_small_swin")
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("naming", [name for name in NAMINGS if "swin" in name])
def test_swin_weights_under_any_name(naming: str, prefix: str, tmp_path: Path) -> None:
    network = torchvision_swin()
    first = SwinBackbone("swin_t", 0)
    file = tmp_path / "swin.pth"
    torch.save(network.state_dict(), file)
    load_backbone_weights(first, str(file))
    image = torch.randn(SWIN_IMAGE)
    with torch.no_grad():
        expected = torchvision_maps(network, image)
    for found, wanted in zip(maps_of(first, image), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    theirs = NAMINGS[naming].to_theirs(first.state_dict())
    assert find_naming({prefix + key: value for key, value in theirs.items()}) == (
        NAMINGS[naming],
        prefix,
    )
    other = {"neck.weight": torch.zeros(1)} if prefix else {}
    torch.save({"state_dict": {prefix + k: v for k, v in theirs.items()} | other}, file)
    second = SwinBackbone("swin_t", 0)
    load_backbone_weights(second, str(file))
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in second.state_dict().items())


@pytest.mark.usefixtures("_small_swin")
def test_mmdetection_orders_merged_channels_by_channel() -> None:
    state = SwinBackbone("swin_t", 0).state_dict()
    ours, norm = (
        f"network.swin.encoder.layers.0.downsample.{name}.weight" for name in ("reduction", "norm")
    )
    state = {key: torch.randn_like(state[key]) for key in (ours, norm)}
    theirs = NAMINGS["mmdetection_swin"].to_theirs(state)
    x = torch.randn(1, SMALL_SWIN.width, 6, 8)
    # as mmdetection computes it: unfold, norm, linear
    tokens = F.unfold(x, 2, stride=2).transpose(1, 2)
    key = "stages.0.downsample."
    tokens = F.layer_norm(tokens, tokens.shape[-1:], theirs[f"{key}norm.weight"])
    expected = F.linear(tokens, theirs[f"{key}reduction.weight"])
    merging = SwinBackbone("swin_t", 0).network.swin.encoder.layers[0].downsample
    merging.load_state_dict(
        {"reduction.weight": state[ours], "norm.weight": state[norm]}, strict=False
    )
    with torch.no_grad():
        found = merging(x.flatten(2).transpose(1, 2), (6, 8))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    back = NAMINGS["mmdetection_swin"].to_ours(theirs)[0]
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_old_spelling_of_offsets() -> None:
    table = NAMINGS["torchvision_resnet"].table
    new = "layer2.0.conv2.conv_offset.weight"
    assert table.ours("layer2.0.conv2_offset.weight") == new
    assert table.ours(new) == table.theirs(new) == new
