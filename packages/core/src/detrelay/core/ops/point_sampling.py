"""Weighted bilinear sampling of a feature pyramid: one primitive for every head.

The sums are evaluated as weighted bags of rows (`embedding_bag`): a cell's channels are one
contiguous piece of memory, which `grid_sample` on channels-first maps would gather one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def sample_maps(levels: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples over levels and points, read from feature maps in place.

    Cell centres lie at (i + 0.5) / size, as in `grid_sample` with `align_corners=False`; outside a
    level everything is zero. Made for a few hundred queries; `token_sampling` serves an encoder.

    Args:
        levels: L tensors [B, H_l, W_l, G, D] with G groups of D channels.
        locations: [B, Q, G, N, L, P, 2], (x, y) in [0, 1] of each padded level: N sums for each
            query and group, P points of each level in every sum.
        weights: [B, Q, G, N, L, P].

    Returns:
        [B, Q, G, N, D].

    Reference:
        Teng et al., ICCV 2023, section 3.3 (P = 1, each point reads all levels).
    """
    shapes = [(level.shape[1], level.shape[2]) for level in levels]
    total = None
    for level, (cell, weight) in zip(levels, _corners(shapes, locations, weights), strict=True):
        part = _bag(level.flatten(1, 2), cell, weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def channels_last_maps(levels: Sequence[Tensor], groups: int) -> tuple[Tensor, ...]:
    """Levels [B, C, H, W] as [B, H, W, G, C / G], copied only if their layout asks for it."""
    return tuple(
        level.permute(0, 2, 3, 1).contiguous().unflatten(-1, (groups, -1)) for level in levels
    )


def _bag(values: Tensor, cell: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows: values [B, S, G, D], cell and weight [B, Q, G, N, I]."""
    batch, cells, groups, channels = values.shape
    image = torch.arange(batch, device=values.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=values.device).view(1, 1, -1, 1, 1)
    row = cell * groups + (image * (cells * groups) + group)
    sums = F.embedding_bag(
        row.flatten(0, 3),
        values.reshape(-1, channels),
        per_sample_weights=weight.flatten(0, 3).to(values.dtype),
        mode="sum",
    )
    return sums.view(*cell.shape[:4], channels)


def _corners(shapes: Shapes, locations: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each level the cells next to every point and their weights, [B, Q, G, N, P * 4]."""
    for level, (height, width) in enumerate(shapes):
        x = locations[..., level, :, 0] * width - 0.5  # [B, Q, G, N, P]
        y = locations[..., level, :, 1] * height - 0.5
        columns, column_share = _neighbours(x, width)  # [B, Q, G, N, P, 2]
        rows, row_share = _neighbours(y, height)
        row_share = row_share * weights[..., level, :, None]
        cell = (rows * width)[..., :, None] + columns[..., None, :]
        yield cell.flatten(-3), (row_share[..., :, None] * column_share[..., None, :]).flatten(-3)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two cells around a position on one axis and their shares, zero outside: [..., 2]."""
    low = position.detach().floor()
    high_share = position - low
    index = torch.stack([low, low + 1], dim=-1)
    share = torch.stack([1 - high_share, high_share], dim=-1)
    inside = (index >= 0) & (index < size)
    return index.clamp(0, size - 1).long(), share * inside
