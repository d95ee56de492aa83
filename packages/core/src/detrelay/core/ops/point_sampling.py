"""Weighted bilinear sampling of a feature pyramid: one primitive for every head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def flatten_levels(levels: Sequence[Tensor]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Lay the cells of all levels out as rows.

    Args:
        levels: L tensors [B, C, H_l, W_l].

    Returns:
        Values [B, S, C] with S the cells of all levels, level by level, row by row; and the shapes
        (H_l, W_l).
    """
    shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1), shapes


def sample_points(
    values: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Weighted sums of bilinear samples over levels and points.

    Cell centres lie at (i + 0.5) / size, as in `grid_sample` with `align_corners=False`; outside a
    level everything is zero. The sum is evaluated as a weighted bag of rows, which reads each
    corner as one contiguous piece of memory.

    Args:
        values: [B, S, G, D], cells of all levels, G groups (or attention heads) of D channels.
        shapes: (H_l, W_l) of each level, S = sum of H_l * W_l.
        locations: [B, Q, G, N, L, P, 2], (x, y) in [0, 1] of each padded level: N sums for each
            query and group, P points of each level in every sum.
        weights: [B, Q, G, N, L, P].

    Returns:
        [B, Q, G, N, D].

    Reference:
        Zhu et al., ICLR 2021, equation 3 (N = 1); Teng et al., ICCV 2023, section 3.3 (P = 1).
    """
    batch, cells, groups, channels = values.shape
    lead = locations.shape[:4]  # [B, Q, G, N]
    index, weight = _corners(shapes, locations, weights)  # [B, Q, G, N, L * P * 4]
    image = torch.arange(batch, device=values.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=values.device).view(1, 1, -1, 1, 1)
    row = (index + image * cells) * groups + group
    sums = F.embedding_bag(
        row.flatten(0, 3),
        values.reshape(-1, channels),
        per_sample_weights=weight.flatten(0, 3).to(values.dtype),
        mode="sum",
    )
    return sums.view(*lead, channels)


def _corners(
    shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Cell index and weight of the four neighbours of every point, [B, Q, G, N, L * P * 4]."""
    indices, factors = [], []
    start = 0
    for level, (height, width) in enumerate(shapes):
        x = locations[..., level, :, 0] * width - 0.5  # [B, Q, G, N, P]
        y = locations[..., level, :, 1] * height - 0.5
        left, top = x.detach().floor(), y.detach().floor()
        right_share, bottom_share = x - left, y - top
        columns = torch.stack([left, left + 1], dim=-1)  # [..., P, 2]
        rows = torch.stack([top, top + 1], dim=-1)
        column_share = torch.stack([1 - right_share, right_share], dim=-1)
        row_share = torch.stack([1 - bottom_share, bottom_share], dim=-1)
        column_share = column_share * ((columns >= 0) & (columns < width))
        row_share = row_share * ((rows >= 0) & (rows < height))
        columns = columns.clamp(0, width - 1).long()
        rows = rows.clamp(0, height - 1).long()
        cell = start + rows[..., :, None] * width + columns[..., None, :]  # [..., P, 2, 2]
        share = row_share[..., :, None] * column_share[..., None, :]
        indices.append(cell.flatten(-3))
        factors.append((share * weights[..., level, :, None, None]).flatten(-3))
        start += height * width
    return torch.cat(indices, dim=-1), torch.cat(factors, dim=-1)
