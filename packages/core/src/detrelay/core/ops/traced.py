"""Sampling for graphs that leave PyTorch, in operations that other runtimes run fast.

Exporters turn `embedding_bag` into loops over rows. Here every corner is one row of a single
gather, and a weighted sum is a matrix product. Level sizes stay symbolic, so a graph serves images
of any size; rows are int64, as ONNX requires.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detrelay.core.ops.reference import Shapes


def sample_by_gather(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples over levels and points, see `sample_points`.

    Args:
        values: [B, S, G, D].
        shapes: (H_l, W_l) of each level, S = sum of H_l * W_l.
        locations: [B, Q, G, N, L, P, 2], (x, y) in [0, 1] of each level.
        weights: [B, Q, G, N, L, P].

    Returns:
        [B, Q, G, N, D].
    """
    batch, cells, groups, dim = values.shape
    # the rows of image b and group g are b * S * G + cell * G + g
    image = torch.arange(batch, device=values.device).view(-1, 1, 1, 1, 1) * (cells * groups)
    start = image + torch.arange(groups, device=values.device).view(-1, 1, 1)
    rows, shares = [], []
    first = 0
    for level, (height, width) in enumerate(shapes):
        low_x, share_x = _cells(locations[..., level, :, 0], width)
        low_y, share_y = _cells(locations[..., level, :, 1], height)
        for column, by_x in zip(low_x, share_x, strict=True):
            for line, by_y in zip(low_y, share_y, strict=True):
                rows.append(start + (first + line * width + column) * groups)
                shares.append(by_x * by_y * weights[..., level, :])
        first = first + height * width
    row, share = torch.cat(rows, -1), torch.cat(shares, -1)  # [B, Q, G, N, 4 * L * P]
    read = values.reshape(-1, dim)[row.flatten()].view(-1, share.shape[-1], dim)
    sums = share.reshape(-1, 1, share.shape[-1]).to(values.dtype) @ read
    return sums.view(*share.shape[:-1], dim)


def _cells(location: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Lower and upper cell of a coordinate in [0, 1], and their shares: 0 outside the level."""
    position = location * size - 0.5
    low = position.floor()
    part = position - low
    inside = (low >= 0) & (low < size)
    above = (low >= -1) & (low < size - 1)
    cells = (low.clamp(0, size - 1).long(), (low + 1).clamp(0, size - 1).long())
    return cells, ((1 - part) * inside, part * above)
