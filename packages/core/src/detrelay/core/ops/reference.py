"""The definition of sampling that the fast kernels must match, in twice differentiable operations.

It also serves second derivatives and the transforms of `torch.func`, which the kernels lack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = tuple[tuple[int, int], ...]


def split_levels(values: Tensor, shapes: Shapes) -> list[Tensor]:
    """The levels [B, H_l, W_l, ...] of values [B, S, ...]."""
    parts = values.split([height * width for height, width in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def with_border(values: Tensor, shapes: Shapes, before: int, after: int) -> Tensor:
    """Values [B, S, C] with rows and columns of zeros before and after each level: [B, S', C]."""
    border = (0, 0, before, after, before, after)
    return torch.cat([F.pad(x, border).flatten(1, 2) for x in split_levels(values, shapes)], dim=1)


def sample_by_definition(
    values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples over levels and points, see `sample_points`.

    Args:
        values: [B, S, G, D].
        shapes: (H_l, W_l) of each level, S = sum of H_l * W_l.
        locations: [B, Q, G, N, L, P, 2], (x, y) in [0, 1] of each level.
        weights: [B, Q, G, N, L, P].

    Returns:
        [B, Q, G, N, D].
    """
    parts = []
    for index, level in enumerate(split_levels(values, shapes)):
        height, width = shapes[index]
        cells = level.flatten(1, 2)
        size = locations.new_tensor([width, height])
        position = locations[..., index, :, :] * size - 0.5  # [B, Q, G, N, P, 2]
        low = position.detach().floor()
        high_share = position - low
        # a NaN location keeps its NaN share, which the criterion reports, and reads a valid cell
        low = low.nan_to_num(0)
        for corner_x, share_x in ((0, 1 - high_share[..., 0]), (1, high_share[..., 0])):
            for corner_y, share_y in ((0, 1 - high_share[..., 1]), (1, high_share[..., 1])):
                corner = low + low.new_tensor([corner_x, corner_y])
                cell = torch.minimum(corner, size - 1).clamp(min=0)
                inside = (cell == corner).all(-1).to(low.dtype)
                share = share_x * share_y * inside * weights[..., index, :]
                row = (cell[..., 1] * width + cell[..., 0]).long()
                parts.append((_read(cells, row) * share[..., None].to(cells.dtype)).sum(-2))
    return torch.stack(parts).sum(0)


def _read(level: Tensor, row: Tensor) -> Tensor:
    """Cells [B, Q, G, N, P, D] of a level [B, H * W, G, D] that `row` [B, Q, G, N, P] names."""
    by_group = level.transpose(1, 2)  # [B, G, H * W, D]
    index = row.transpose(1, 2)  # [B, G, Q, N, P]
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, level.shape[-1])
    return by_group.gather(2, flat).unflatten(2, index.shape[2:]).transpose(1, 2)


def in_transform() -> bool:
    """Whether a transform of `torch.func` (grad, vmap, jvp) is active."""
    return bool(torch._C._are_functorch_transforms_active())


def empty_sums(shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
    """Empty sums: zeros of the first input's dtype, with all inputs in the graph."""
    zero = sum(tensor.flatten()[:0].sum() for tensor in inputs)
    return inputs[0].new_zeros(shape) + zero.to(inputs[0].dtype)  # type: ignore[union-attr]
