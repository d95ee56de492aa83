"""Sine and cosine codes of positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# keeps rows and columns without a real pixel finite
_EPSILON = 1e-6


def sine_code(turns: Tensor, width: int, temperature: float) -> Tensor:
    """Encode every number by `width` sines and cosines, interleaved.

    Feature 2i is the sine and feature 2i + 1 the cosine of 2 pi x / temperature^(2i / width).

    Args:
        turns: [..., A], at least float32; a box's coordinates in [0, 1] are at most one turn.
        width: features for each number, even.
        temperature: ratio of the longest to the shortest wave length.

    Returns:
        [..., A * width], all features of the first number first.
    """
    exponent = torch.arange(0, width, 2, dtype=turns.dtype, device=turns.device) / width
    angle = (2 * math.pi * turns)[..., None] / temperature**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def grid_position_code(
    valid: Tensor, dim: int, temperature: float, offset: float, dtype: torch.dtype
) -> Tensor:
    """Encode every cell of a feature map by its position in the unpadded image.

    Args:
        valid: bool [B, H, W], True on real pixels.
        dim: channels; the first half codes y, the second x.
        temperature: see `sine_code` (10000 in Deformable DETR, 20 in DINO).
        offset: added to the cell's index, counted from 1 (-0.5 in Deformable DETR, 0 in DINO).
        dtype: of the result; the code itself is computed in at least float32.

    Returns:
        [B, H * W, dim].

    Reference:
        Carion et al., ECCV 2020, appendix A.4; Zhu et al., ICLR 2021, released code.
    """
    real = valid.to(torch.promote_types(dtype, torch.float32))
    y, x = real.cumsum(1), real.cumsum(2)
    y = (y + offset) / (y[:, -1].unsqueeze(1) + _EPSILON)
    x = (x + offset) / (x[:, :, -1].unsqueeze(2) + _EPSILON)
    return sine_code(torch.stack([y, x], dim=-1), dim // 2, temperature).flatten(1, 2).to(dtype)
