"""StageInteractor's cascade dynamic mixing: own filters, and those of earlier stages again.

Letters: R = B * Q rows (image and query), G groups, D = C / G channels a group, N = P * K sampled
points (P base points times a pattern of K), O output patterns, J reused filters.

Groups never meet before the last projection, so they may be mixed block by block; g groups make one
block. On a CPU this keeps the filters and features of a block in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from detrelay.core.ops.linear import linear

# Rows times groups of a block on a CPU: at the published width its filters and features take about
# 20 MB. Measured with 100 and 300 queries, see docs/log.md.
_CPU_BLOCK = 512
_NORM_EPSILON = 1e-5

Adapter = Literal["full", "channel", "none"]


@dataclass(frozen=True, slots=True)
class FilterBank:
    """Dynamic filters of one block of groups that earlier stages hand on.

    Attributes:
        channel: channel filters [R, g, D, D] (input, output channel), oldest first.
        spatial: spatial filters [R, g, O, N] of the newest stage; None before there is one.
    """

    channel: tuple[Tensor, ...] = ()
    spatial: Tensor | None = None

    def append(self, channel: Tensor, spatial: Tensor) -> FilterBank:
        """The bank with one more stage."""
        return FilterBank((*self.channel, channel), spatial)


def empty_banks(rows: int, groups: int, device: torch.device) -> tuple[FilterBank, ...]:
    """One empty bank for each block of groups that is mixed at a time.

    Args:
        rows: R, queries of all images.
        groups: G.
        device: where the mixing will run.
    """
    blocks = 1
    if device.type == "cpu":
        enough = (n for n in range(1, groups) if groups % n == 0)
        enough = (n for n in enough if rows * groups <= n * _CPU_BLOCK)
        blocks = next(enough, groups)
    return (FilterBank(),) * blocks


@dataclass(frozen=True, slots=True)
class MixingShape:
    """Sizes of one stage's mixing.

    Attributes:
        dim: C, width of queries and feature maps.
        groups: G.
        base_points: P.
        pattern: K.
        out_points: O.
        reused: J, how many channel filters of the bank are applied again.
        reuse_spatial: whether half of the spatial filters are blended with the newest of the bank.
        adapter: what carries own-mixed features on before a reused filter.
        has_bias: whether channel and spatial mixing add dynamic biases.
    """

    dim: int
    groups: int
    base_points: int
    pattern: int
    out_points: int
    reused: int
    reuse_spatial: bool
    adapter: Adapter
    has_bias: bool

    @property
    def width(self) -> int:
        """D, channels a group."""
        return self.dim // self.groups

    @property
    def points(self) -> int:
        """N, sampled points a group."""
        return self.base_points * self.pattern

    @property
    def own_patterns(self) -> int:
        """Spatial filters that the stage generates itself."""
        return self.out_points // 2 if self.reuse_spatial else self.out_points


class StaticAdapter(nn.Module):
    """Carries own-mixed features over to one reused filter, by static weights.

    "full" mixes, for each pattern point, all base points and channels, and for each base point the
    whole pattern and all channels; "channel" has two D x D linears instead; "none" passes the
    features on as they are.

    Reference:
        Teng et al., ICCV 2023, section 3.3 and figure 6; "channel" is the released code's
        `abla_use_static_channel_mix`, "none" is ours.
    """

    def __init__(self, shape: MixingShape) -> None:
        super().__init__()
        self.shape = shape
        if shape.adapter == "none":
            return
        full = shape.adapter == "full"
        axis = shape.width * (shape.base_points if full else 1)
        pattern = shape.width * (shape.pattern if full else 1)
        self.axis = nn.Linear(axis, axis)
        self.pattern = nn.Linear(pattern, pattern)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero: at the start only the sampled features reach a reused filter."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, carried: Tensor) -> Tensor:
        """Add what the adapter makes of `features` to `carried`, both [R, G, N, D]."""
        shape = self.shape
        if shape.adapter == "none":
            return carried + features
        if shape.adapter == "channel":
            return carried + self.axis(features) + self.pattern(features)
        lead = features.shape[:2]
        grid = (*lead, shape.base_points, shape.pattern, shape.width)
        turned = (*lead, shape.pattern, shape.base_points, shape.width)
        by_axis = self.axis(features.view(grid).transpose(2, 3).flatten(3))
        by_pattern = self.pattern(features.view(*lead, shape.base_points, -1))
        # linears keep no output for their gradient, so their results may be added to in place
        by_axis = by_axis.view(turned).transpose(2, 3)
        return by_pattern.view(grid).add_(by_axis).flatten(2, 3).add_(carried)


class DynamicMixing(nn.Module):
    """Mixes sampled features by filters generated from the query, own and reused.

    Args:
        shape: the sizes of the stage.

    Reference:
        Teng et al., ICCV 2023, section 3.3, equation 3; AdaMixer (Gao et al., CVPR 2022) without
        reuse. Where figure 6 draws one more reused filter a stage than the released code, the
        code is followed.
    """

    def __init__(self, shape: MixingShape) -> None:
        super().__init__()
        self.shape = shape
        dim, groups, width, reused = shape.dim, shape.groups, shape.width, shape.reused
        self.channel_size = width * width
        self.generator = nn.Linear(
            dim, groups * (self.channel_size + shape.own_patterns * shape.points)
        )
        self.bias_generator = (
            nn.Linear(dim, groups * (width + shape.out_points)) if shape.has_bias else None
        )
        self.adapters = nn.ModuleList(StaticAdapter(shape) for _ in range(reused))
        self.channel_gates = nn.Linear(dim, 2 * dim * reused) if reused else None
        self.channel_biases = nn.Linear(dim, dim * reused) if reused else None
        blend = shape.reuse_spatial
        self.pattern_gate = nn.Linear(dim, groups * shape.own_patterns) if blend else None
        self.point_gate = nn.Linear(dim, groups * shape.points) if blend else None
        self.out_proj = nn.Linear(groups * shape.out_points * width, dim)
        self.norm = nn.LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weights: at the start filters and biases do not depend on the query.

        Biases keep the default of `nn.Linear`, those of the gates are zero (gates of one half).
        """
        generators = (self.generator, self.bias_generator, self.channel_biases, self.out_proj)
        gates = (self.channel_gates, self.pattern_gate, self.point_gate)
        for module in (*generators, *gates):
            if module is not None:
                nn.init.zeros_(module.weight)
        for module in gates:
            if module is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, sampled: Tensor, queries: Tensor, banks: Sequence[FilterBank]
    ) -> tuple[Tensor, tuple[FilterBank, ...]]:
        """Mix the features of every query into it.

        Args:
            sampled: [R, G, N, D].
            queries: [R, C].
            banks: the filters of earlier stages, one bank a block of groups.

        Returns:
            Queries [R, C] after mixing, and the banks with this stage's filters.
        """
        count = len(banks)
        mixed: Tensor = self.out_proj.bias
        grown = []
        for features, dynamic, bank, weight in zip(
            sampled.chunk(count, dim=1),
            self._generate(queries, count),
            banks,
            self.out_proj.weight.chunk(count, dim=1),
            strict=True,
        ):
            patterns, grown_bank = self._mix_block(features, dynamic, bank)
            mixed = mixed + F.linear(patterns.flatten(1), weight)
            grown.append(grown_bank)
        return self.norm(queries + mixed), tuple(grown)

    def _generate(self, queries: Tensor, count: int) -> Iterator[_Dynamic]:
        """Everything that is generated from the queries, block by block."""
        modules = {
            "filters": self.generator,
            "biases": self.bias_generator,
            "channel_gates": self.channel_gates,
            "channel_biases": self.channel_biases,
            "pattern_gate": self.pattern_gate,
            "point_gate": self.point_gate,
        }
        # chunks and not slices: the gradient of a slice is as large as the whole parameter
        chunks = {
            name: list(zip(module.weight.chunk(count), module.bias.chunk(count), strict=True))
            for name, module in modules.items()
            if module is not None
        }
        groups = self.shape.groups // count
        for block in range(count):
            yield _Dynamic(
                **{
                    name: linear(queries, *pieces[block]).unflatten(-1, (groups, -1))
                    for name, pieces in chunks.items()
                }
            )

    def _mix_block(
        self, sampled: Tensor, dynamic: _Dynamic, bank: FilterBank
    ) -> tuple[Tensor, FilterBank]:
        """Mix one block of groups: [R, g, N, D] to patterns [R, g, O, D]."""
        shape = self.shape
        channel = dynamic.filters[..., : self.channel_size].unflatten(-1, (-1, shape.width))
        spatial = dynamic.filters[..., self.channel_size :].unflatten(-1, (-1, shape.points))
        channel_bias = pattern_bias = None
        if dynamic.biases is not None:
            channel_bias = dynamic.biases[..., None, : shape.width]
            pattern_bias = dynamic.biases[..., shape.width :, None]
        mixed = _mix(sampled, channel, channel_bias)
        if shape.reused:
            mixed = self._reuse(sampled, mixed, channel, dynamic, bank)
        if shape.reuse_spatial:
            spatial = _blend_spatial(spatial, dynamic, bank)
        patterns = _mix(spatial, mixed, pattern_bias)
        return patterns, bank.append(channel, spatial)

    def _reuse(
        self,
        sampled: Tensor,
        mixed: Tensor,
        channel: Tensor,
        dynamic: _Dynamic,
        bank: FilterBank,
    ) -> Tensor:
        """Apply the newest J filters of the bank in turn, each blended with the own filter."""
        assert dynamic.channel_gates is not None
        assert dynamic.channel_biases is not None
        width, reused = self.shape.width, self.shape.reused
        # channels last: the products below run along them
        gates = dynamic.channel_gates.unflatten(-1, (width, 2, reused)).movedim(2, -1)
        gates = gates.contiguous().sigmoid()  # [R, g, 2, J, D]
        biases = dynamic.channel_biases.unflatten(-1, (reused, 1, width))
        carried = sampled
        for index, (adapter, earlier) in enumerate(
            zip(self.adapters, bank.channel[-reused:], strict=True)
        ):
            carried = adapter(mixed, carried)
            # equation 3: gates over input and output channels blend own and earlier filter
            gate = gates[:, :, 1, index, :, None] * gates[:, :, 0, index, None, :]
            blended = _blend(channel, earlier, gate)
            mixed = _mix(carried, blended, biases[:, :, index])
        return mixed


@dataclass(frozen=True, slots=True)
class _Dynamic:
    """What the queries generate for one block of groups, each [R, g, -1]."""

    filters: Tensor
    biases: Tensor | None = None
    channel_gates: Tensor | None = None
    channel_biases: Tensor | None = None
    pattern_gate: Tensor | None = None
    point_gate: Tensor | None = None


def _blend_spatial(own: Tensor, dynamic: _Dynamic, bank: FilterBank) -> Tensor:
    """Own spatial filters and the same blended with earlier ones: [R, g, O / 2, N] -> [., O, N]."""
    assert dynamic.pattern_gate is not None
    assert dynamic.point_gate is not None
    assert bank.spatial is not None
    gate = dynamic.pattern_gate.sigmoid().unsqueeze(-1) * dynamic.point_gate.sigmoid().unsqueeze(-2)
    earlier = bank.spatial[:, :, : own.shape[2]]
    return torch.cat([own, _blend(own, earlier, gate)], dim=2)


def _blend(own: Tensor, earlier: Tensor, gate: Tensor) -> Tensor:
    """(1 - gate) * own + gate * earlier; without gradients in the memory of the gate."""
    return torch.lerp(own, earlier, gate, out=None if torch.is_grad_enabled() else gate)


def _mix(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Mix by a batched product, then normalise and rectify: [R, g, M, K] @ [R, g, K, D].

    The LayerNorm goes over points (or patterns) and channels together and has no affine part.

    Args:
        left: [R, g, M, K].
        right: [R, g, K, D].
        bias: added to the product, [R, g, M, 1] or [R, g, 1, D].
    """
    x = left @ right
    shape = x.shape[-2:]
    # Only on a CPU, where memory is what takes long: the same by passes over x in place.
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype.itemsize < 4:
        return F.layer_norm(x if bias is None else x.add_(bias), shape, eps=_NORM_EPSILON).relu_()
    shift = -x.mean((-2, -1), keepdim=True)
    if bias is not None:
        shift = shift + bias - bias.mean((-2, -1), keepdim=True)
    norm = torch.linalg.vector_norm(x.add_(shift), dim=(-2, -1), keepdim=True)
    return x.relu_().mul_((norm.square() / shape.numel() + _NORM_EPSILON).rsqrt())


def uniform_offsets(*shape: int, bound: float) -> Tensor:
    """Random (x, y) offsets in [-bound, bound] with a zero third coordinate: [*shape, 3]."""
    offsets = torch.zeros(*shape, 3)
    offsets[..., :2].uniform_(-bound, bound)
    return offsets


class PointGenerator(nn.Module):
    """Makes the 3-D sampling points of every query: positions and a scale.

    With a pattern the points of a group come in two steps: P base points, and around each, scaled
    by its own z, one pattern of K points that all groups share.

    Args:
        dim: C.
        groups: G.
        base_points: P.
        pattern: K.
        two_step: False predicts all P * K points of a group directly.
        start_scale: z of new base points, log2 of pixels.

    Reference:
        Teng et al., ICCV 2023, section 3.4; one-step points are the released code's
        `use_holistic_sampling_points`, and AdaMixer's.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        base_points: int,
        pattern: int,
        two_step: bool,
        start_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.start_scale = start_scale
        self.groups = groups
        self.pattern = pattern
        points = base_points if two_step else base_points * pattern
        self.base = nn.Linear(dim, 3 * groups * points)
        self.inner = nn.Linear(dim, 3 * pattern) if two_step else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points spread over the box at random, the same for every query."""
        nn.init.zeros_(self.base.weight)
        base = uniform_offsets(self.base.out_features // 3, bound=0.5)
        base[:, 2] = self.start_scale
        init.copy_(self.base.bias, base.flatten())
        if self.inner is not None:
            nn.init.zeros_(self.inner.weight)
            inner = uniform_offsets(self.pattern, bound=0.5 / math.sqrt(2))
            inner[0] = 0  # the first point of a pattern is its base point
            init.copy_(self.inner.bias, inner.flatten())

    def forward(self, queries: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Points of every query.

        Args:
            queries: [B, Q, C].
            boxes: [B, Q, 4] x, y, z = log2 of the scale, r = log2 of height / width; pixels.

        Returns:
            Positions [2, B, Q, G, N] (x, then y) in pixels and scales [B, Q, G, N] (log2 pixels).
        """
        center, scale, ratio = boxes[..., :2], boxes[..., 2:3], boxes[..., 3:4]
        size = torch.cat([2 ** (scale - 0.5 * ratio), 2 ** (scale + 0.5 * ratio)], dim=-1)
        offsets = self.base(queries).to(boxes.dtype).unflatten(-1, (self.groups, -1, 1, 3))
        offsets = offsets.movedim(-1, 0).contiguous()
        xy, z = offsets[:2], offsets[2]  # [2, B, Q, G, P, 1], [B, Q, G, P, 1]
        if self.inner is not None:
            inner = self.inner(queries).to(boxes.dtype).unflatten(-1, (1, 1, -1, 3))
            inner = inner.movedim(-1, 0)
            xy = xy + 2**z * inner[:2]  # [2, B, Q, G, P, K]
            z = z + inner[2]
        xy, z = xy.flatten(-2), z.flatten(-2)  # [..., N]
        center, size = (x.movedim(-1, 0)[..., None, None] for x in (center, size))
        positions = center + size * xy
        return positions, scale[:, :, None] + z
