"""Necks: backbone feature maps to the levels that heads read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrelay.core.structures import FeaturePyramid


class ChannelMapper(nn.Module):
    """A 1x1 convolution a level and one GroupNorm that all levels share.

    Args:
        in_channels: channels of each feature map.
        out_channels: channels of every level.
        num_groups: groups of the norm.

    Reference:
        AdaMixer and StageInteractor, released configs (`ChannelMapping`).
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_groups: int = 32) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, kernel_size=1) for c in in_channels)
        self.norm = nn.GroupNorm(num_groups, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map L tensors [B, in_channels[i], H, W] to L tensors [B, out_channels, H, W]."""
        return tuple(
            self.norm(conv(level)) for conv, level in zip(self.convs, features, strict=True)
        )


def build_pyramid(
    levels: Sequence[Tensor], strides: Sequence[int], pixel_mask: Tensor
) -> FeaturePyramid:
    """Join levels, their valid cells and the image sizes.

    Args:
        levels: L tensors [B, C, H, W].
        strides: L strides, pixels.
        pixel_mask: [B, H, W], 1 or True on real pixels, which fill the top left corner.
    """
    mask = pixel_mask[:, None].float()
    valid = tuple(F.interpolate(mask, size=level.shape[-2:])[:, 0] > 0.5 for level in levels)
    real = pixel_mask.bool()
    height, width = real.any(dim=2).sum(dim=1), real.any(dim=1).sum(dim=1)
    return FeaturePyramid(
        levels=tuple(levels),
        strides=tuple(strides),
        valid=valid,
        image_sizes=torch.stack([height, width], dim=1),
    )
