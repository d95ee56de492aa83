"""ResNeXt with deformable convolutions, Swin transformers, and weights under others' names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from transformers import AutoModelForObjectDetection, ResNetConfig, ResNetModel, SwinConfig
from transformers import SwinForImageClassification as SwinClassifier

from detrelay.core.backbones import SWINS, Backbone, ResNetBackbone, SwinBackbone, build_backbone
from detrelay.core.backbones.naming import NAMINGS, find_backbone, find_naming
from detrelay.core.backbones.resnet import DeformableConv2d
from detrelay.core.backbones.swin import SwinSizes
from detrelay.core.backbones.weights import load_backbone_weights
from detrelay.heads import StageInteractorForObjectDetection
from factories import small_config

SMALL = SwinSizes(16, (2, 1, 2, 1), (1, 2, 2, 4), 4)
IMAGE = (2, 3, 148, 188)  # odd numbers of patches


@pytest.fixture
def _small_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWINS, "swin_t", SMALL)


def torchvision_swin() -> SwinTransformer:
    torch.manual_seed(1)
    network = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=SMALL.width,
        depths=list(SMALL.depths),
        num_heads=list(SMALL.num_heads),
        window_size=[SMALL.window] * 2,
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


def maps_of(backbone: Backbone, image: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return backbone.eval()(image)


@pytest.mark.usefixtures("_small_swin")
@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("naming", [name for name in NAMINGS if "swin" in name])
def test_swin_weights_under_any_name(naming: str, prefix: str, tmp_path: Path) -> None:
    network = torchvision_swin()
    first = SwinBackbone("swin_t", 0)
    file = tmp_path / "swin.pth"
    torch.save(network.state_dict(), file)
    load_backbone_weights(first, str(file))
    image = torch.randn(IMAGE)
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
    x = torch.randn(1, SMALL.width, 6, 8)
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


@pytest.mark.usefixtures("_small_swin")
def test_files_of_transformers_swin(tmp_path: Path) -> None:
    theirs = SwinClassifier(
        SwinConfig(
            embed_dim=SMALL.width,
            depths=SMALL.depths,
            num_heads=SMALL.num_heads,
            window_size=SMALL.window,
        )
    )
    theirs.save_pretrained(tmp_path)
    backbone = SwinBackbone("swin_t", 0, num_stages=3, num_maps=1)
    load_backbone_weights(backbone, str(tmp_path / "model.safetensors"))
    name = "encoder.layers.1.blocks.0.attention.k_proj.weight"
    assert torch.equal(backbone.network.swin.get_parameter(name), theirs.swin.get_parameter(name))


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


def test_old_spelling_of_offsets() -> None:
    table = NAMINGS["torchvision_resnet"].table
    new = "layer2.0.conv2.conv_offset.weight"
    assert table.ours("layer2.0.conv2_offset.weight") == new
    assert table.ours(new) == table.theirs(new) == new


@pytest.mark.parametrize("prefix", ["", "resnet."])
def test_files_of_transformers_resnet(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = ResNetModel(
        ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    ).eval()
    path = tmp_path / "model.safetensors"
    save_file({prefix + key: value for key, value in theirs.state_dict().items()}, path)
    backbone = ResNetBackbone("resnet18", "eval", 0)
    load_backbone_weights(backbone, str(path))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(image).last_hidden_state
    torch.testing.assert_close(maps_of(backbone, image)[-1], expected, atol=1e-4, rtol=1e-4)
    assert find_backbone(backbone.state_dict()) == "resnet18"


def test_names_and_options_that_are_refused() -> None:
    with pytest.raises(
        StrictDataclassError, match="unknown backbone resnext101_32x4; did you mean resnext"
    ):
        small_config(backbone_name="resnext101_32x4")
    with pytest.raises(
        StrictDataclassError, match="backbone_drop_path is for Swin transformers; resnet18"
    ):
        small_config(backbone_drop_path=0.1)
    with pytest.raises(
        StrictDataclassError, match=r"backbone_drop_path must lie in \[0, 1\); found 1"
    ):
        small_config(backbone_name="swin_t", backbone_drop_path=1)
    with torch.device("meta"):
        backbone = build_backbone("swin_l", "eval", 0)
    with pytest.raises(ValueError, match="no weights of swin_l; train with backbone weights"):
        load_backbone_weights(backbone, "imagenet")
    with pytest.raises(ValueError, match="a backbone of other sizes than any of resnet18"):
        find_backbone({"conv1.weight": torch.zeros(1)})
