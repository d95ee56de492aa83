"""Sampling for graphs that leave PyTorch, in operations that other runtimes run fast.

Exporters turn `embedding_bag` into loops over rows. Here every corner is one row of a single
gather, and a weighted sum is a matrix product. Level sizes stay symbolic, so a graph serves images
of any size. Memory traffic is what costs time: rows are therefore int32, all levels are processed
together, and a border of zeros around each level replaces masks for what lies outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detrelay.core.ops.numbers import filled
from detrelay.core.ops.reference import Shapes, with_border

# cells of zeros before and after a level: a sample may lie half a cell before it or beyond it, and
# its upper cell one further
_BEFORE, _AFTER = 1, 2


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
    batch, _, groups, dim = values.shape
    lines = [width + _BEFORE + _AFTER for _, width in shapes]
    cells = [
        (height + _BEFORE + _AFTER) * line for (height, _), line in zip(shapes, lines, strict=True)
    ]
    sizes = filled([[width, height] for height, width in shapes], locations)
    line, first = filled([lines, [sum(cells[:level]) for level in range(len(cells))]], sizes)
    column, by_x = _cell(locations[..., 0], sizes[:, :1])  # [B, Q, G, N, L, P]
    row, by_y = _cell(locations[..., 1], sizes[:, 1:])
    # the row of image b, cell c and group g is (b * cells + c) * G + g
    step = groups * line.to(torch.int32)[:, None]
    image = torch.arange(batch, device=values.device, dtype=torch.int32).view(-1, 1, 1, 1, 1, 1)
    group = torch.arange(groups, device=values.device, dtype=torch.int32).view(-1, 1, 1, 1)
    start = image * (groups * sum(cells)) + (groups * first.to(torch.int32)[:, None] + group)
    upper = row * step + column * groups + start
    lower = upper + step
    rows = torch.cat([upper, upper + groups, lower, lower + groups], -1).flatten(-2)
    above, below = (1 - by_y) * weights, by_y * weights
    left = 1 - by_x
    shares = torch.cat([above * left, above * by_x, below * left, below * by_x], -1).flatten(-2)
    table = with_border(values.flatten(2), shapes, _BEFORE, _AFTER).view(-1, dim)
    read = table.index_select(0, rows.flatten()).view(-1, shares.shape[-1], dim)
    sums = shares.reshape(-1, 1, shares.shape[-1]).to(values.dtype) @ read
    return sums.view(*shares.shape[:-1], dim)


def _cell(location: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Lower cell of the padded level, int32, and the share of the upper one."""
    position = torch.minimum((location * size + (_BEFORE - 0.5)).clamp(min=0), size + _BEFORE)
    low = position.floor()
    return low.to(torch.int32), position - low
