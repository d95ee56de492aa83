"""What every backbone offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

BackboneNorm = Literal["frozen", "eval", "train"]


class Backbone(nn.Module):
    """Images to feature maps, finest first; the first stage has stride 4, each next one twice that.

    Args:
        name: as in the config.
        stage_channels: channels of each stage's map.
        num_maps: how many maps are returned, counted from the last stage; None for all.

    Attributes:
        channels: channels of the returned maps.
        strides: their strides in pixels.
    """

    def __init__(self, name: str, stage_channels: Sequence[int], num_maps: int | None) -> None:
        super().__init__()
        self.name = name
        first = 0 if num_maps is None else len(stage_channels) - num_maps
        self.channels = tuple(stage_channels[first:])
        self.strides = tuple(4 << stage for stage in range(first, len(stage_channels)))

    def freeze(self) -> None:
        """Fix the parameters that the settings exclude from training; nothing by default.

        Called after weights were loaded as well, since that may have made new parameters.
        """

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of [B, 3, H, W]: one tensor [B, channels[i], H / strides[i], ...] a map."""
        raise NotImplementedError
