"""Necks: backbone feature maps to the levels that heads read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrelay.core.ops.eager import runs_at_once_on_cpu
from detrelay.core.structures import FeaturePyramid


class ChannelMapper(nn.Module):
    """A 1x1 convolution per level and one GroupNorm shared by all levels.

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
        _reset_convs(self.convs)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map L tensors [B, in_channels[i], H, W] to L tensors [B, out_channels, H, W]."""
        return tuple(
            _normalized(self.norm, conv(level))
            for conv, level in zip(self.convs, features, strict=True)
        )


class LevelMapper(nn.Module):
    """A separate convolution and GroupNorm for every level, and coarser levels on top.

    Each of the last backbone maps passes a 1x1 convolution. Extra levels come from 3x3 convolutions
    of stride 2: the first takes the backbone's last map as it is, further ones the level before.

    Args:
        in_channels: channels of the backbone maps used, finest first.
        num_levels: all levels, the extra ones included.
        out_channels: channels of every level.
        num_groups: groups of the norms.

    Reference:
        Zhu et al., ICLR 2021, appendix A.2.
    """

    def __init__(
        self, in_channels: Sequence[int], num_levels: int, out_channels: int, num_groups: int = 32
    ) -> None:
        super().__init__()
        self.num_maps = len(in_channels)
        self.convs = nn.ModuleList(nn.Conv2d(c, out_channels, kernel_size=1) for c in in_channels)
        for index in range(num_levels - self.num_maps):
            channels = out_channels if index else in_channels[-1]
            self.convs.append(nn.Conv2d(channels, out_channels, 3, stride=2, padding=1))
        self.norms = nn.ModuleList(nn.GroupNorm(num_groups, out_channels) for _ in self.convs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, zero biases."""
        _reset_convs(self.convs)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map the last of the backbone's maps [B, in_channels[i], H, W] to `num_levels` levels."""
        sources = list(features[-self.num_maps :])
        levels: list[Tensor] = []
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if index < self.num_maps:
                source = sources[index]
            else:
                source = sources[-1] if index == self.num_maps else levels[-1]
            levels.append(_normalized(norm, conv(source)))
        return tuple(levels)


def _reset_convs(convs: nn.ModuleList) -> None:
    for conv in convs:
        nn.init.xavier_uniform_(conv.get_parameter("weight"))
        nn.init.zeros_(conv.get_parameter("bias"))


def _normalized(norm: nn.Module, level: Tensor) -> Tensor:
    # torch's GroupNorm of channels-last maps on a CPU subtracts the squared mean from the mean of
    # squares, which leaves three to four digits where the mean is large
    if _may_stay_channels_last(norm, level):
        return _group_norm_in_place(norm, level)
    normalized: Tensor = norm(level.contiguous())
    return normalized


def _may_stay_channels_last(norm: nn.Module, level: Tensor) -> TypeGuard[nn.GroupNorm]:
    return (
        type(norm) is nn.GroupNorm
        and norm.affine
        and runs_at_once_on_cpu(level)
        and level.dtype == norm.weight.dtype
        and level.is_contiguous(memory_format=torch.channels_last)
        and not level.is_contiguous()
        and not torch.is_grad_enabled()
    )


def _group_norm_in_place(norm: nn.GroupNorm, level: Tensor) -> Tensor:
    """GroupNorm of a channels-last map [B, C, H, W], which stays so, in its own memory.

    Means are taken off before squares are summed.
    """
    batch, channels, height, width = level.shape
    cells = level.permute(0, 2, 3, 1).view(batch, height * width, channels)

    def by_group(values: Tensor) -> Tensor:
        means = values.unflatten(1, (norm.num_groups, -1)).mean(2)  # [B, groups]
        return means.repeat_interleave(channels // norm.num_groups, dim=1)[:, None]

    cells.sub_(by_group(cells.mean(1)))
    squares = torch.linalg.vector_norm(cells, dim=1).square() / (height * width)
    scale = (by_group(squares) + norm.eps).rsqrt() * norm.weight
    torch.addcmul(norm.bias, cells, scale, out=cells)
    return level


def pad_to(divisor: int, images: Tensor) -> Tensor:
    """Pad images or masks at the bottom and the right to sides that are multiples of a number.

    Args:
        divisor: the number; 1 leaves everything as it is.
        images: [..., H, W].
    """
    if divisor == 1:
        return images
    height, width = images.shape[-2:]
    # written so that a graph's formulas of the new sizes are multiples of the divisor
    right, below = ((n + divisor - 1) // divisor * divisor - n for n in (width, height))
    return F.pad(images, (0, right, 0, below))


def build_pyramid(
    levels: Sequence[Tensor], strides: Sequence[float], pixel_mask: Tensor
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
