"""Backbones: images to feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

BackboneNorm = Literal["frozen", "eval", "train"]


class ResNetBackbone(nn.Module):
    """A ResNet of torchvision without its classifier; parameter names are torchvision's.

    Args:
        name: "resnet18", "resnet34", "resnet50" or "resnet101".
        norm: "frozen", "eval" or "train", see `DetectorConfig`.
        frozen_stages: number of residual stages that are not trained, the stem with them.
        num_stages: how many residual stages there are; fewer than four leave the last ones out.

    Attributes:
        channels: channels of the feature maps.
        strides: their strides in pixels.
    """

    def __init__(
        self, name: str, norm: BackboneNorm, frozen_stages: int, num_stages: int = 4
    ) -> None:
        super().__init__()
        self.name = name
        self.norm = norm
        self.frozen_stages = frozen_stages
        self.num_stages = num_stages
        network = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.relu, self.maxpool = network.relu, network.maxpool
        for stage in range(1, num_stages + 1):
            self.add_module(f"layer{stage}", network.get_submodule(f"layer{stage}"))
        width = network.fc.in_features
        self.channels = tuple(width >> (3 - stage) for stage in range(num_stages))
        self.strides = tuple(4 << stage for stage in range(num_stages))
        self._freeze()

    def reset_parameters(self) -> None:
        """Initialise the convolutions as torchvision's ResNet does (He, fan-out)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{stage}") for stage in range(1, self.num_stages + 1)]

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages == 0:
            return []
        return [self.conv1, self.bn1, *self._stages()[: self.frozen_stages]]

    def _freeze(self) -> None:
        frozen: list[nn.Module] = self._frozen_modules()
        if self.norm == "frozen":
            frozen += [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNetBackbone:
        """Switch to training, except for norms whose statistics are fixed."""
        super().train(mode)
        fixed = [self] if self.norm != "train" else self._frozen_modules()
        for root in fixed:
            for module in root.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of [B, 3, H, W]: one tensor [B, channels[i], H / 4, ...] a stage."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        levels = []
        for stage in self._stages():
            x = stage(x)
            levels.append(x)
        return tuple(levels)


def load_resnet_weights(backbone: ResNetBackbone, source: str) -> None:
    """Fill a backbone with pre-trained weights.

    Args:
        backbone: filled in place.
        source: "imagenet" (torchvision's weights, downloaded once and cached), "none" (left as it
            is), or a `.pth` / `.safetensors` file of a torchvision ResNet.

    Raises:
        OSError: the download failed; says how to go on without a network.
        ValueError: the file is missing, unreadable, or of another network.
    """
    if source == "none":
        return
    state = _imagenet_weights(backbone.name) if source == "imagenet" else _read_weights(source)
    absent = ("fc.", *(f"layer{stage}." for stage in range(backbone.num_stages + 1, 5)))
    state = {key: value for key, value in state.items() if not key.startswith(absent)}
    expected = backbone.state_dict()
    wrong = sorted(
        key
        for key in expected.keys() | state.keys()
        if key not in state or key not in expected or state[key].shape != expected[key].shape
    )
    wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
    if wrong:
        raise ValueError(
            f"{source}: not the weights of a torchvision {backbone.name}: {len(wrong)} entries are "
            f"missing, unknown or of another shape, such as {', '.join(wrong[:3])}"
        )
    backbone.load_state_dict(state, strict=False)


def _imagenet_weights(name: str) -> dict[str, Tensor]:
    # V1: the weights the published recipes started from
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"could not download the ImageNet weights of {name} ({error}); put "
            f"{Path(weights.url).name} from {weights.url} into {cache}, or train with backbone "
            f'weights "none" or the path of a local file'
        ) from error


def _read_weights(source: str) -> dict[str, Tensor]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f'{source}: no such file; backbone weights are "imagenet", "none" or a local file'
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{source}: cannot be read as weights: {error}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{source}: expected a flat state dict of tensors")
    return state
