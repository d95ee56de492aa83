"""Weighted bilinear sampling of a flattened pyramid by as many queries as it has cells.

`point_sampling` is the counterpart for a few hundred queries that read the maps in place.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.ops.numbers import filled
from detrelay.core.ops.reference import (
    Shapes,
    empty_sums,
    in_transform,
    sample_by_definition,
    split_levels,
    with_border,
)
from detrelay.core.ops.traced import sample_by_gather

__all__ = ["Shapes", "flatten_levels", "sample_points", "uses_kernel"]

_POINTS_AT_A_TIME = 2**15  # on a CPU, whose cache should hold what is read and computed for them
_BORDER = 2  # cells of zeros on each side of a level: a point outside reads two of them


def flatten_levels(levels: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
    """Lay the cells of all levels out as rows.

    Args:
        levels: L tensors [B, C, H_l, W_l].

    Returns:
        Values [B, S, C] with S the cells of all levels, level by level, row by row; and the shapes
        (H_l, W_l).
    """
    shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1), shapes


def sample_points(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of bilinear samples over levels and points.

    Cell centres lie at (i + 0.5) / size, as in `grid_sample` with `align_corners=False`; outside a
    level everything is zero. The sum is evaluated as a weighted bag of rows, which reads each
    corner as one contiguous piece of memory. Only the arguments are kept for the backward pass.
    If `uses_kernel` is true, the kernels of `deformops` evaluate it instead.

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
    batch, queries, groups, sums = locations.shape[:4]
    if torch.compiler.is_exporting():
        return sample_by_gather(values, shapes, locations, weights)
    if weights.numel() == 0:
        return empty_sums((*weights.shape[:4], values.shape[-1]), values, locations, weights)
    if in_transform():
        return sample_by_definition(values, shapes, locations, weights)
    if sums == 1 and uses_kernel(values.device, values.dtype):
        return sample_by_kernel(values, shapes, locations[:, :, :, 0], weights[:, :, :, 0])
    # a "slot" is one group of one image, the unit that is sampled independently
    slot_values = values.transpose(1, 2).flatten(0, 1)  # [B * G, S, D]
    slot_locations = locations.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # [B * G, Q * N, ...]
    slot_weights = weights.transpose(1, 2).flatten(0, 1).flatten(1, 2)
    step = batch * groups
    if values.device.type == "cpu":
        step = min(step, max(1, _POINTS_AT_A_TIME // max(1, slot_weights[0].numel())))
    parts = [
        _sample_slots(v, shapes, at, w)
        for v, at, w in zip(
            slot_values.split(step), slot_locations.split(step), slot_weights.split(step),
            strict=True,
        )
    ]  # fmt: skip
    sampled = torch.cat(parts).view(batch, groups, queries, sums, -1)
    return sampled.transpose(1, 2)


def uses_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether deformable attention runs on the kernels of the package `deformops`.

    It does on CUDA, in single and half precision, if that package is installed (the extra
    `kernels`, Python 3.12 or newer). Elsewhere plain PyTorch computes the same sums.
    """
    return device.type == "cuda" and dtype is not torch.float64 and _has_deformops()


@cache
def _has_deformops() -> bool:
    return importlib.util.find_spec("deformops") is not None


def sample_by_kernel(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """`sample_points` for one sum by `deformops`, which chooses a kernel for the device.

    Args:
        values: [B, S, G, D].
        shapes: (H_l, W_l) of each level.
        locations: [B, Q, G, L, P, 2].
        weights: [B, Q, G, L, P].

    Returns:
        [B, Q, G, 1, D].
    """
    msda = importlib.import_module("deformops.registry").msda
    sizes = torch.tensor(shapes, device=values.device)
    cells = sizes.prod(dim=1)
    sampled: Tensor = msda(
        values,
        sizes,
        cells.cumsum(0) - cells,
        locations.contiguous(),
        weights.flatten(3).to(values.dtype),
    )
    return sampled.view(*locations.shape[:3], 1, values.shape[-1])


def _sample_slots(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """[X, S, D], [X, M, L, P, 2] and [X, M, L, P] -> [X, M, D] for X slots with M sums each."""
    inputs = (values, locations, weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _SlotSampling.apply(values, shapes, locations, weights)
    return _weighted_sums(values, shapes, locations, weights)


def _weighted_sums(values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    rows = with_border(values, shapes, _BORDER, _BORDER).flatten(0, 1)
    step = locations.shape[1]
    if values.device.type == "cpu" and not torch.compiler.is_compiling():  # it fuses the steps
        step = max(1, _POINTS_AT_A_TIME // max(1, weights[:, 0].numel()))
    parts = []
    for at, weight in zip(locations.split(step, 1), weights.split(step, 1), strict=True):
        corners = _Corners(shapes, at)
        parts.append(
            F.embedding_bag(
                corners.row.flatten(0, 1),
                rows,
                per_sample_weights=corners.share(weight).flatten(0, 1).to(values.dtype),
                mode="sum",
            ).view(*at.shape[:2], -1)
        )
    return torch.cat(parts, dim=1)


def _without_border(padded: Tensor, shapes: Shapes) -> Tensor:
    """The cells [X, S, D] of the levels themselves."""
    inner = slice(_BORDER, -_BORDER)
    levels = split_levels(padded, _bordered(shapes))
    return torch.cat([level[:, inner, inner].flatten(1, 2) for level in levels], dim=1)


def _bordered(shapes: Shapes) -> Shapes:
    return tuple((height + 2 * _BORDER, width + 2 * _BORDER) for height, width in shapes)


def _cells(shapes: Shapes) -> int:
    return sum(height * width for height, width in shapes)


class _Corners:
    """The four cells around every point, of levels with a border of zeros.

    A point outside moves to the border, where both of its cells are zeros along that axis: so
    neither shares nor slopes have to know what is outside. Every step runs along L * P points,
    contiguous, since a step along two coordinates or four corners takes several times as long.

    Attributes:
        row: int32 [X, M, 4 * L * P], rows in [X * S', D] of the corners; upper left, upper right,
            lower left and lower right of all points.
        right, lower: [X, M, L * P], share of the right column and of the lower row.
        width, height: [L * P], of each point's level.
    """

    def __init__(self, shapes: Shapes, locations: Tensor) -> None:
        slots, _, _, points = locations.shape[:4]
        bordered = _bordered(shapes)
        starts = [_cells(bordered[:level]) for level in range(len(shapes))]
        slot = torch.arange(slots, dtype=torch.int32, device=locations.device) * _cells(bordered)
        rows = [(wide, start) for (_, wide), start in zip(bordered, starts, strict=True)]
        wide, start = filled(rows, slot).repeat_interleave(points, dim=0).t().contiguous()
        sizes = filled(shapes, locations).repeat_interleave(points, dim=0)
        self.height, self.width = sizes.t().contiguous()
        line, self.lower = self._place(locations[..., 1], self.height)
        column, self.right = self._place(locations[..., 0], self.width)
        first = line.mul_(wide).add_(column).add_(start).add_(slot.view(-1, 1, 1))
        below = first + wide
        self.row = torch.cat([first, first + 1, below, below + 1], dim=-1)

    @staticmethod
    def _place(location: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """First of a point's two cells along an axis, int32, and the share of the second."""
        position = location.flatten(2) * size
        position += _BORDER - 0.5
        share = position.frac()
        cell = torch.minimum(position.clamp_(min=0), size + _BORDER)
        # a NaN location keeps its NaN share, which the criterion reports, and reads a zero
        return cell.nan_to_num_(0).to(torch.int32), share

    def share(self, weights: Tensor) -> Tensor:
        """Shares of the corners times weights [X, M, L, P]: [X, M, 4 * L * P]."""
        weight = weights.flatten(2)
        lower = weight * self.lower
        upper = weight - lower
        lower_right = lower * self.right
        upper_right = upper * self.right
        corners = [upper - upper_right, upper_right, lower - lower_right, lower_right]
        return torch.cat(corners, dim=-1)


class _SlotSampling(torch.autograd.Function):
    """Sampling that recomputes the corners in its backward pass.

    Autograd's own backward of the bag sorts the rows of all slots at once and keeps every corner:
    on a CPU, at an encoder's size, that takes twice the time and ten times the memory.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.shapes = shapes
        ctx.save_for_backward(values, locations, weights)
        return _weighted_sums(values, shapes, locations, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, locations, weights = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _twice_differentiable(ctx, grad)
        corners = _Corners(ctx.shapes, locations)
        padded = with_border(values, ctx.shapes, _BORDER, _BORDER)
        grad = grad.to(values.dtype).flatten(0, 1)  # [X * M, D]
        row = corners.row.flatten(0, 1)
        grad_padded = _scatter_rows(grad, row, corners.share(weights), padded)
        # product of every corner's row with the gradient of its sum
        products = _row_products(padded.flatten(0, 1), row, grad).to(weights.dtype)
        products = products.view(*weights.shape[:2], 4, -1)
        upper_left, upper_right, lower_left, lower_right = products.unbind(2)  # [X, M, L * P]
        upper = torch.lerp(upper_left, upper_right, corners.right)
        lower = torch.lerp(lower_left, lower_right, corners.right)
        slope_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, corners.lower)
        weight = weights.flatten(2)
        grad_locations = torch.stack(
            [slope_x * weight * corners.width, (lower - upper) * weight * corners.height], dim=-1
        )
        grad_weights = torch.lerp(upper, lower, corners.lower)
        return (
            _without_border(grad_padded, ctx.shapes),
            None,
            grad_locations.view_as(locations),
            grad_weights.view_as(weights),
        )


def _twice_differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `_SlotSampling` in differentiable operations."""
    values, locations, weights = ctx.saved_tensors
    inputs = (values, locations, weights)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    sampled = sample_by_definition(  # a slot as an image of one group, its sums as queries
        values[:, :, None], ctx.shapes, locations[:, :, None, None], weights[:, :, None, None]
    )
    found = iter(
        torch.autograd.grad(sampled[:, :, 0, 0], trained, grad.to(sampled.dtype), create_graph=True)
    )
    grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
    return grads[0], None, *grads[1:]


def _scatter_rows(grad: Tensor, row: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """Add each sum's gradient to the rows it read, as a bag of sums for every row: like `values`.

    Args:
        grad: [X * M, D].
        row: [X * M, J], what each sum read.
        weight: J weights for each of the X * M sums, in any shape.
        values: [X, S, D].
    """
    reader = torch.arange(len(grad), dtype=row.dtype, device=row.device)
    reader = reader.repeat_interleave(row.shape[1])
    order = row.flatten().argsort()
    count = torch.bincount(row.flatten(), minlength=values.shape[0] * values.shape[1])
    sums = F.embedding_bag(
        reader[order],
        grad,
        (count.cumsum(0) - count).to(row.dtype),
        per_sample_weights=weight.flatten()[order].to(grad.dtype),
        mode="sum",
    )
    return sums.view_as(values)


def _row_products(values: Tensor, row: Tensor, grad: Tensor) -> Tensor:
    """Inner products [X * M, J] of each sum's gradient with the rows it read."""
    sums, count = row.shape
    offsets = torch.arange(0, sums * count, count, dtype=row.dtype, device=row.device)
    reader = torch.arange(sums, dtype=row.dtype, device=row.device).repeat_interleave(count)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, values, row.flatten(), offsets, reader, 0
    )
