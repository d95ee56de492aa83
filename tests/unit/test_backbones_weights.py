"""Pre-trained weights of backbones, under various names."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetModel, SwinConfig
from transformers import SwinForImageClassification as SwinClassifier

from detrelay.core.backbones import ResNetBackbone, SwinBackbone, build_backbone
from detrelay.core.backbones.naming import find_backbone
from detrelay.core.backbones.weights import load_backbone_weights
from factories import small_config
from factories_backbones import SMALL_SWIN, maps_of


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_local_file(suffix: str, tmp_path: Path) -> None:
    source = torchvision.models.resnet18(weights=None)
    path = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = ResNetBackbone("resnet18", "eval", 1, num_stages=3)
    load_backbone_weights(backbone, str(path))
    assert torch.equal(backbone.layer3[1].conv2.weight, source.layer3[1].conv2.weight)


def test_none_leaves_weights_alone() -> None:
    backbone = ResNetBackbone("resnet18", "eval", 1)
    before = backbone.conv1.weight.clone()
    load_backbone_weights(backbone, "none")
    assert torch.equal(backbone.conv1.weight, before)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit",)


def test_bad_weight_files_are_refused(tmp_path: Path) -> None:
    backbone = ResNetBackbone("resnet18", "eval", 1)
    with pytest.raises(ValueError, match=r'no such file; backbone weights are "imagenet"'):
        load_backbone_weights(backbone, str(tmp_path / "nothing.pth"))
    torn = tmp_path / "torn.pth"
    torn.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"torn.pth: cannot be read as weights"):
        load_backbone_weights(backbone, str(torn))
    other = tmp_path / "other.pth"
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), other)
    with pytest.raises(ValueError, match="not the weights of a resnet18"):
        load_backbone_weights(backbone, str(other))
    nested = tmp_path / "nested.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, nested)
    with pytest.raises(ValueError, match="not the weights of a resnet18: no backbone is known"):
        load_backbone_weights(backbone, str(nested))


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"conv1.weight": Bomb()}, path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone_weights(ResNetBackbone("resnet18", "eval", 1), str(path))


def test_offline_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_args: object, **_options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    torch_home = str(tmp_path)
    monkeypatch.setenv("TORCH_HOME", torch_home)
    with pytest.raises(OSError, match=r"could not download .*resnet18.*put resnet18-\w+\.pth"):
        load_backbone_weights(ResNetBackbone("resnet18", "eval", 1), "imagenet")


@pytest.mark.usefixtures("_small_swin")
def test_files_of_transformers_swin(tmp_path: Path) -> None:
    theirs = SwinClassifier(
        SwinConfig(
            embed_dim=SMALL_SWIN.width,
            depths=SMALL_SWIN.depths,
            num_heads=SMALL_SWIN.num_heads,
            window_size=SMALL_SWIN.window,
        )
    )
    theirs.save_pretrained(tmp_path)
    backbone = SwinBackbone("swin_t", 0, num_stages=3, num_maps=1)
    load_backbone_weights(backbone, str(tmp_path / "model.safetensors"))
    name = "encoder.layers.1.blocks.0.attention.k_proj.weight"
    assert torch.equal(backbone.network.swin.get_parameter(name), theirs.swin.get_parameter(name))


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
