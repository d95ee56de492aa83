"""Weighted bilinear sampling of a feature pyramid by a few hundred queries, from the maps in place.

The sums are evaluated as weighted bags of rows (`embedding_bag`): a cell's channels are one
contiguous piece of memory, which `grid_sample` on channels-first maps would gather one by one.
`token_sampling` is the counterpart for an encoder, which has as many queries as cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.ops.numbers import filled
from detrelay.core.ops.reference import Shapes, empty_sums, in_transform, sample_by_definition
from detrelay.core.ops.traced import sample_by_gather

_INT32_ROWS = 2**31  # larger levels are indexed by int64


def sample_maps(levels: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over levels of bilinear samples at points.

    Cell centres lie at (i + 0.5) / size, as in `grid_sample` with `align_corners=False`; outside a
    level everything is zero. Coordinates and levels come first: elementwise work runs along the
    points, several times faster than along two coordinates or four corners.

    Args:
        levels: L tensors [B, H_l, W_l, G, D] with G groups of D channels.
        locations: [2, L, B, Q, G, N], x and then y of N points for each query and group, in [0, 1]
            of each padded level.
        weights: [L, B, Q, G, N].

    Returns:
        [B, Q, G, N, D].

    Reference:
        Teng et al., ICCV 2023, section 3.3.
    """
    if torch.compiler.is_exporting():
        return sample_by_gather(*_as_points(levels, locations, weights))
    if weights.numel() == 0:
        return empty_sums((*weights.shape[1:], levels[0].shape[-1]), *levels, locations, weights)
    if in_transform():
        return _by_definition(levels, locations, weights)
    sampled = _sample(levels, locations, weights)
    if torch.is_grad_enabled() and sampled.requires_grad and not torch.compiler.is_compiling():
        sampled = _TwiceDifferentiable.apply(sampled, locations, weights, *levels)
    return sampled


def _sample(levels: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    rows, shares = _corners(levels, locations, weights)
    total = None
    for level, row, share in zip(levels, rows, shares, strict=True):
        part = F.embedding_bag(
            row,
            level.reshape(-1, level.shape[-1]),
            per_sample_weights=share.to(level.dtype),
            mode="sum",
        )
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.view(*weights.shape[1:], -1)


def channels_last_maps(levels: Sequence[Tensor], groups: int) -> tuple[Tensor, ...]:
    """Levels [B, C, H, W] as [B, H, W, G, C / G], copied only if their layout asks for it."""
    return tuple(
        level.permute(0, 2, 3, 1).contiguous().unflatten(-1, (groups, -1)) for level in levels
    )


class _TwiceDifferentiable(torch.autograd.Function):
    """Passes sums through; if their gradient is differentiated, it is taken from the definition.

    The kernel of the bags has no second derivative: without this, parts of it would be missing.
    """

    @staticmethod
    def forward(
        ctx: Any, sampled: Tensor, locations: Tensor, weights: Tensor, *levels: Tensor
    ) -> Tensor:
        ctx.save_for_backward(locations, weights, *levels)
        return sampled.view_as(sampled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, *(None for _ in ctx.saved_tensors)
        locations, weights, *levels = inputs = ctx.saved_tensors
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        sampled = _by_definition(levels, locations, weights)
        found = iter(torch.autograd.grad(sampled, trained, grad, create_graph=True))
        return None, *(next(found) if tensor.requires_grad else None for tensor in inputs)


def _by_definition(levels: Sequence[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    return sample_by_definition(*_as_points(levels, locations, weights))


def _as_points(
    levels: Sequence[Tensor], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Shapes, Tensor, Tensor]:
    """The same as arguments of `sample_points`."""
    shapes = tuple((level.shape[1], level.shape[2]) for level in levels)
    values = torch.cat([level.flatten(1, 2) for level in levels], dim=1)
    at = locations.permute(2, 3, 4, 5, 1, 0)[..., None, :]  # [B, Q, G, N, L, 1, 2]
    return values, shapes, at, weights.movedim(0, -1)[..., None]


def _corners(levels: Sequence[Tensor], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in its level of the four cells around every point, and their shares: [L, points, 4]."""
    batch, _, groups, _ = weights.shape[1:]
    sizes = filled([[w, h] for _, h, w, _, _ in (level.shape for level in levels)], locations)
    sizes = sizes.t()[..., None, None, None, None]  # [2, L, 1, 1, 1, 1]
    position = locations * sizes - 0.5
    low = position.detach().floor()
    high_share = position - low
    # a NaN location keeps its NaN share, which the criterion reports, and reads a valid cell
    low = low.nan_to_num_(0)
    corner = torch.stack([low, low + 1])  # [2, 2, L, B, Q, G, N]: low or high, x or y
    cell = torch.minimum(corner, sizes - 1).clamp_(min=0)
    share = torch.stack([1 - high_share, high_share]) * (cell == corner)  # nothing outside
    # on a CPU a float becomes an int32 several times as fast as an int64
    largest = max(level.numel() // level.shape[-1] for level in levels)
    fits = weights.device.type == "cpu" and largest <= _INT32_ROWS
    integer = torch.int32 if fits else torch.int64
    column, row = cell.to(integer).unbind(1)
    column_share, row_share = share.unbind(1)
    width, height = sizes.to(integer)
    image = torch.arange(batch, dtype=integer, device=weights.device)[:, None, None, None]
    group = torch.arange(groups, dtype=integer, device=weights.device)[:, None]
    start = (image * height * groups + row * groups) * width + group
    rows = start[:, None] + column * groups  # [2, 2, L, ...]: y, x
    shares = (row_share * weights)[:, None] * column_share
    return _as_bags(rows), _as_bags(shares)


def _as_bags(x: Tensor) -> Tensor:
    """[2, 2, L, ...] as [L, points, 4]: the corners of a point are one bag."""
    return x.reshape(4, x.shape[2], -1).permute(1, 2, 0).contiguous()
