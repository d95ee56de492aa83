"""The interface of all backbones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

BackboneNorm = Literal["frozen", "eval", "train"]


@dataclass(frozen=True)
class BackboneSettings:
    """What a backbone is built from, apart from its name.

    Attributes:
        norm: "frozen", "eval" or "train", see `DetectorConfig`.
        frozen_stages: number of stages that are not trained, including the stem.
        num_stages: how many stages there are; fewer than four omit the last ones.
        num_maps: how many maps are returned, counted from the last stage; None for all.
        drop_path: see `DetectorConfig`.
        options: backbone-specific arguments, see `DetectorConfig`.
    """

    norm: BackboneNorm = "eval"
    frozen_stages: int = 0
    num_stages: int = 4
    num_maps: int | None = None
    drop_path: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)


class Backbone(nn.Module):
    """Images to feature maps, finest first.

    Args:
        name: as in the config.
        channels: channels of the returned maps.
        strides: their strides, pixels.

    Attributes:
        divisor: images are padded so that height and width are multiples of it.
        image_mean: mean of each colour channel, subtracted from pixels in [0, 1].
        image_std: standard deviation of each channel, by which they are then divided.
    """

    divisor = 1
    image_mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)

    def __init__(self, name: str, channels: Sequence[int], strides: Sequence[float]) -> None:
        super().__init__()
        self.name = name
        self.channels = tuple(channels)
        self.strides = tuple(strides)

    def freeze(self) -> None:
        """Freeze the parameters that the settings exclude from training; nothing by default.

        Also called after weights are loaded, since that may create new parameters.
        """

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of [B, 3, H, W]: one [B, channels[i], H / strides[i], ...] per map."""
        raise NotImplementedError

    def load_pretrained(self, source: str) -> None:
        """Load the weights that `source` names; not supported by default.

        Raises:
            ValueError: there are none by that name.
        """
        raise ValueError(
            f"{source}: {self.name} has no pre-trained weights; set train.backbone_weights=none"
        )


def stage_maps(
    stage_channels: Sequence[int], num_maps: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and strides of the last maps of stages that halve the resolution, from stride 4.

    Args:
        stage_channels: channels of each stage's map.
        num_maps: how many maps are returned, counted from the last stage; None for all.
    """
    first = 0 if num_maps is None else len(stage_channels) - num_maps
    strides = tuple(4 << stage for stage in range(first, len(stage_channels)))
    return tuple(stage_channels[first:]), strides
