from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from detrelay.core.backbones import ResNetBackbone
from detrelay.core.backbones.weights import load_backbone_weights


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
