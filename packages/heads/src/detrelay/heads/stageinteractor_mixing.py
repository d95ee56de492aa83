"""StageInteractor's cascade dynamic mixing: own filters, and those of earlier stages again.

Letters: R = B * Q rows (image and query), G groups, D = C / G channels a group, N = P * K sampled
points (P base points times a pattern of K), O output patterns, J reused filters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

Adapter = Literal["full", "channel", "none"]


@dataclass(frozen=True, slots=True)
class FilterBank:
    """Dynamic filters that earlier stages hand on.

    Attributes:
        channel: channel filters [R, G, D, D] (input, output channel), oldest first.
        spatial: spatial filters [R, G, O, N] of the newest stage; None before there is one.
    """

    channel: tuple[Tensor, ...] = ()
    spatial: Tensor | None = None

    def append(self, channel: Tensor, spatial: Tensor) -> FilterBank:
        """The bank with one more stage."""
        return FilterBank((*self.channel, channel), spatial)


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
    """Carries own-mixed features over to one reused filter, by fixed weights.

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
        by_axis = self.axis(features.view(grid).transpose(2, 3).flatten(3)).view(turned)
        by_pattern = self.pattern(features.view(*lead, shape.base_points, -1))
        return carried + by_pattern.view_as(carried) + by_axis.transpose(2, 3).flatten(2, 3)


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
        groups, width, reused = shape.groups, shape.width, shape.reused
        self.channel_size = width * width
        self.generator = nn.Linear(
            shape.dim, groups * (self.channel_size + shape.own_patterns * shape.points)
        )
        self.bias_generator = (
            nn.Linear(shape.dim, groups * (width + shape.out_points)) if shape.has_bias else None
        )
        self.adapters = nn.ModuleList(StaticAdapter(shape) for _ in range(reused))
        self.channel_gates = nn.Linear(shape.dim, 2 * shape.dim * reused) if reused else None
        self.channel_biases = nn.Linear(shape.dim, shape.dim * reused) if reused else None
        reuse_spatial = shape.reuse_spatial
        self.pattern_gate = (
            nn.Linear(shape.dim, groups * shape.own_patterns) if reuse_spatial else None
        )
        self.point_gate = nn.Linear(shape.dim, groups * shape.points) if reuse_spatial else None
        self.out_proj = nn.Linear(groups * shape.out_points * width, shape.dim)
        self.norm = nn.LayerNorm(shape.dim)
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
        self, sampled: Tensor, queries: Tensor, bank: FilterBank
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the features of every query into it.

        Args:
            sampled: [R, G, N, D].
            queries: [R, C].
            bank: the filters of earlier stages.

        Returns:
            Queries [R, C] after mixing, and the filters for the bank: channel [R, G, D, D],
            spatial [R, G, O, N].
        """
        shape = self.shape
        rows, groups = sampled.shape[:2]
        generated = self.generator(queries).view(rows, groups, -1)
        channel = generated[..., : self.channel_size].unflatten(-1, (shape.width, shape.width))
        own_spatial = generated[..., self.channel_size :].unflatten(-1, (-1, shape.points))
        channel_bias, spatial_bias = self._biases(queries)
        mixed = _norm_relu(_product(sampled, channel, channel_bias))
        if shape.reused:
            mixed = self._reuse(sampled, mixed, channel, queries, bank)
        spatial = self._blend_spatial(own_spatial, queries, bank)
        patterns = _norm_relu(_product(spatial, mixed, spatial_bias))  # [R, G, O, D]
        queries = self.norm(queries + self.out_proj(patterns.flatten(1)))
        return queries, channel, spatial

    def _biases(self, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Channel bias [R, G, 1, D] and pattern bias [R, G, O, 1]."""
        if self.bias_generator is None:
            return None, None
        biases = self.bias_generator(queries).unflatten(-1, (self.shape.groups, -1))
        channel, pattern = biases.split([self.shape.width, self.shape.out_points], dim=-1)
        return channel.unsqueeze(2), pattern.unsqueeze(3)

    def _reuse(
        self, sampled: Tensor, mixed: Tensor, channel: Tensor, queries: Tensor, bank: FilterBank
    ) -> Tensor:
        """Apply the newest J filters of the bank in turn, each blended with the own filter."""
        assert self.channel_gates is not None
        assert self.channel_biases is not None
        reused = self.shape.reused
        shape = (self.shape.groups, self.shape.width, 2, reused)
        gates = self.channel_gates(queries).sigmoid().unflatten(-1, shape)
        biases = self.channel_biases(queries).unflatten(-1, (self.shape.groups, reused, 1, -1))
        carried = sampled
        for index, (adapter, earlier) in enumerate(
            zip(self.adapters, bank.channel[-reused:], strict=True)
        ):
            carried = adapter(mixed, carried)
            # equation 3: gates over input and output channels blend own and earlier filter
            gate = gates[..., 1, index].unsqueeze(-1) * gates[..., 0, index].unsqueeze(-2)
            blended = torch.lerp(channel, earlier, gate)
            mixed = _norm_relu(_product(carried, blended, biases[:, :, index]))
        return mixed

    def _blend_spatial(self, own: Tensor, queries: Tensor, bank: FilterBank) -> Tensor:
        """Spatial filters [R, G, O, N]: own ones, and with reuse own ones blended with earlier."""
        if self.pattern_gate is None or self.point_gate is None:
            return own
        assert bank.spatial is not None
        earlier = bank.spatial[:, :, : own.shape[2]]
        groups = self.shape.groups
        by_pattern = self.pattern_gate(queries).sigmoid().unflatten(-1, (groups, -1, 1))
        by_point = self.point_gate(queries).sigmoid().unflatten(-1, (groups, 1, -1))
        return torch.cat([own, torch.lerp(own, earlier, by_pattern * by_point)], dim=2)


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Batched matrix product [R, G, ., .] plus a bias that broadcasts."""
    product = left @ right
    return product if bias is None else product + bias


def _norm_relu(x: Tensor) -> Tensor:
    """LayerNorm over points (or patterns) and channels together, without affine; then ReLU."""
    return F.layer_norm(x, x.shape[-2:]).relu()


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

    Reference:
        Teng et al., ICCV 2023, section 3.4; one-step points are the released code's
        `use_holistic_sampling_points`, and AdaMixer's.
    """

    def __init__(
        self, dim: int, groups: int, base_points: int, pattern: int, two_step: bool
    ) -> None:
        super().__init__()
        self.groups = groups
        self.pattern = pattern
        points = base_points if two_step else base_points * pattern
        self.base = nn.Linear(dim, 3 * groups * points)
        self.inner = nn.Linear(dim, 3 * pattern) if two_step else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points spread over the box at random, the same for every query."""
        nn.init.zeros_(self.base.weight)
        init.copy_(
            self.base.bias, uniform_offsets(self.base.out_features // 3, bound=0.5).flatten()
        )
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
            Positions [B, Q, G, N, 2] in pixels and scales [B, Q, G, N] (log2 pixels).
        """
        center, scale, ratio = boxes[..., :2], boxes[..., 2:3], boxes[..., 3:4]
        size = torch.cat([2 ** (scale - 0.5 * ratio), 2 ** (scale + 0.5 * ratio)], dim=-1)
        offsets = self.base(queries).to(boxes.dtype).unflatten(-1, (self.groups, -1, 1, 3))
        xy, z = offsets[..., :2], offsets[..., 2]  # [B, Q, G, P, 1, 2], [B, Q, G, P, 1]
        if self.inner is not None:
            inner = self.inner(queries).to(boxes.dtype).unflatten(-1, (1, 1, -1, 3))
            xy = xy + (2**z)[..., None] * inner[..., :2]  # [B, Q, G, P, K, 2]
            z = z + inner[..., 2]
        xy, z = xy.flatten(3, 4), z.flatten(3, 4)  # [B, Q, G, N, ...]
        positions = center[:, :, None, None] + size[:, :, None, None] * xy
        return positions, scale[:, :, None] + z
