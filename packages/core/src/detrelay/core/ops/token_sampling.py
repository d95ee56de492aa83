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
)
from detrelay.core.ops.traced import sample_by_gather

__all__ = ["Shapes", "flatten_levels", "sample_points", "uses_kernel"]

_CORNERS_AT_A_TIME = 2**17


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
    if values.device.type == "cpu":  # the data read at a time should fit a CPU's cache
        step = min(step, max(1, _CORNERS_AT_A_TIME // max(1, 4 * slot_weights[0].numel())))
    parts = [
        _sample_slots(v.contiguous(), shapes, at, w)
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
    corners = _Corners(shapes, locations, values.shape[0])
    return corners.gather(values, corners.share() * weights[..., None])


class _Corners:
    """The four cells around every point and the share of each.

    Attributes:
        row: int32 [X * M, L * P * 4], row of each corner in [X * S, D].
        row_share, column_share: [X, M, L, P, 2], shares of the upper / lower row and of the left /
            right column; 0 outside the level.
        row_slope, column_slope: their derivatives by the point's y and x in cells.
        size: [L, 1, 2], width and height of the levels.
    """

    def __init__(self, shapes: Shapes, locations: Tensor, slots: int) -> None:
        self.size = filled([(width, height) for height, width in shapes], locations)[:, None]
        cells = [height * width for height, width in shapes]
        total = sum(cells)
        slot = torch.arange(slots, dtype=torch.int32, device=locations.device) * total
        first = filled([[sum(cells[:level]) for level in range(len(cells))]], slot)[0]
        position = locations * self.size - 0.5  # [X, M, L, P, 2]
        low = position.floor()
        high_share = position - low
        inside = torch.stack([(low >= 0) & (low < self.size), (low >= -1) & (low < self.size - 1)])
        inside = inside.to(locations.dtype)
        share = torch.stack([1 - high_share, high_share]) * inside
        slope = torch.stack([-inside[0], inside[1]])
        # a NaN location keeps its NaN share, which the criterion reports, and reads a valid cell
        low = low.nan_to_num(0)
        last = self.size - 1
        cell = torch.stack([low.clamp(min=0).minimum(last), (low + 1).clamp(min=0).minimum(last)])
        cell = cell.to(torch.int32)
        self.column_share, self.row_share = share[..., 0], share[..., 1]  # [2, X, M, L, P]
        self.column_slope, self.row_slope = slope[..., 0], slope[..., 1]
        width = self.size[..., 0].to(torch.int32)
        line = cell[..., 1] * width + first[:, None] + slot.view(-1, 1, 1, 1)
        row = line[:, None] + cell[None, ..., 0]  # [2, 2, X, M, L, P]
        self.row = row.flatten(0, 1).movedim(0, -1).flatten(0, 1).flatten(1)

    def share(self) -> Tensor:
        """Share of every corner, [X, M, L, P, 4]."""
        return _outer(self.row_share, self.column_share)

    def gather(self, values: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums [X, M, D] of the corners' rows of `values` [X, S, D]."""
        weight = weight.flatten(0, 1).flatten(1).to(values.dtype)
        rows = values.flatten(0, 1)
        sums = F.embedding_bag(self.row, rows, per_sample_weights=weight, mode="sum")
        return sums.view(values.shape[0], -1, values.shape[-1])


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    """Products [X, M, L, P, 4] of two row and two column factors [2, X, M, L, P]."""
    return (rows[:, None] * columns).flatten(0, 1).movedim(0, -1)


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
        corners = _Corners(shapes, locations, values.shape[0])
        return corners.gather(values, corners.share() * weights[..., None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, locations, weights = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _twice_differentiable(ctx, grad)
        corners = _Corners(ctx.shapes, locations, values.shape[0])
        share = corners.share()
        grad = grad.to(values.dtype).flatten(0, 1)  # [X * M, D]
        grad_values = _scatter_rows(grad, corners.row, share * weights[..., None], values)
        # product of every corner's row with the gradient of its sum, [X, M, L, P, 4]
        products = (
            _row_products(values.flatten(0, 1), corners.row, grad).view_as(share).to(share.dtype)
        )
        grad_weights = (share * products).sum(-1)
        grad_x = (_outer(corners.row_share, corners.column_slope) * products).sum(-1)
        grad_y = (_outer(corners.row_slope, corners.column_share) * products).sum(-1)
        grad_locations = torch.stack([grad_x, grad_y], -1) * weights[..., None] * corners.size
        return grad_values, None, grad_locations, grad_weights


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
