"""StageInteractor's cascade dynamic mixing: own filters, and reused ones of earlier stages.

Letters: R = B * Q rows (image and query), G groups, D = C / G channels per group, N = P * K sampled
points (P base points times a pattern of K), O output patterns, J reused filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrelay.heads.stageinteractor.config import MixingShape

_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class FilterBank:
    """Dynamic filters passed on by earlier stages.

    Attributes:
        channel: channel filters [R, G, D, D] (input, output channel), oldest first.
        spatial: spatial filters [R, G, O, N] of the newest stage; None while there is none.
    """

    channel: tuple[Tensor, ...] = ()
    spatial: Tensor | None = None

    def append(self, channel: Tensor, spatial: Tensor) -> FilterBank:
        """The bank with one more stage."""
        return FilterBank((*self.channel, channel), spatial)


class StaticAdapter(nn.Module):
    """Passes own-mixed features on to one reused filter, through static weights.

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
        # the gradient of a linear does not need its output, so adding to it in place is safe
        by_axis = by_axis.view(turned).transpose(2, 3)
        return by_pattern.view(grid).add_(by_axis).flatten(2, 3).add_(carried)


class DynamicMixing(nn.Module):
    """Mixes sampled features by filters generated from the query, own and reused.

    Args:
        shape: the sizes of the stage.

    Reference:
        Teng et al., ICCV 2023, section 3.3, equation 3; AdaMixer (Gao et al., CVPR 2022) without
        reuse. Where figure 6 draws one more reused filter per stage than the released code, this
        follows the code.
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
        dynamic = reused if shape.reuse_filters else 0
        self.channel_gates = nn.Linear(dim, 2 * dim * dynamic) if dynamic else None
        self.channel_biases = nn.Linear(dim, dim * dynamic) if dynamic else None
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
        self, sampled: Tensor, queries: Tensor, bank: FilterBank
    ) -> tuple[Tensor, FilterBank]:
        """Mix the features of every query into it.

        Args:
            sampled: [R, G, N, D].
            queries: [R, C].
            bank: the filters of earlier stages.

        Returns:
            Queries [R, C] after mixing, and the bank with this stage's filters.
        """
        channel, spatial = self._filters(queries)
        channel_bias, pattern_bias = self._biases(queries)
        mixed = _mix(sampled, channel, channel_bias)
        if self.shape.reused and not self.shape.reuse_filters:
            mixed = self._mix_statically(sampled, mixed)
        elif self.shape.reused:
            mixed = self._reuse(sampled, mixed, channel, queries, bank)
        if self.shape.reuse_spatial:
            spatial = self._reuse_spatial(spatial, queries, bank)
        patterns = _mix(spatial, mixed, pattern_bias)  # [R, G, O, D]
        mixed = self.out_proj(patterns.flatten(1))
        return self.norm(queries + mixed), bank.append(channel, spatial)

    def _filters(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Own filters: channel [R, G, D, D] and spatial [R, G, O or O / 2, N]."""
        shape = self.shape
        filters = self._grouped(self.generator(queries))
        return (
            filters[..., : self.channel_size].unflatten(-1, (-1, shape.width)),
            filters[..., self.channel_size :].unflatten(-1, (-1, shape.points)),
        )

    def _biases(self, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Dynamic biases of channel mixing [R, G, 1, D] and of spatial mixing [R, G, O, 1]."""
        if self.bias_generator is None:
            return None, None
        biases = self._grouped(self.bias_generator(queries))
        return biases[..., None, : self.shape.width], biases[..., self.shape.width :, None]

    def _reuse(
        self, sampled: Tensor, mixed: Tensor, channel: Tensor, queries: Tensor, bank: FilterBank
    ) -> Tensor:
        """Apply the newest J filters of the bank in turn, each blended with the own filter."""
        assert self.channel_gates is not None
        assert self.channel_biases is not None
        width, reused = self.shape.width, self.shape.reused
        # channels last: the products below run along them
        gates = self.gate_factors(self.channel_gates(queries))
        biases = self._grouped(self.channel_biases(queries)).unflatten(-1, (reused, 1, width))
        carried = sampled
        for index, (adapter, earlier) in enumerate(
            zip(self.adapters, bank.channel[-reused:], strict=True)
        ):
            carried = adapter(mixed, carried)
            # equation 3: gates over input and output channels blend own and earlier filters
            gate = gates[:, :, 1, index, :, None] * gates[:, :, 0, index, None, :]
            mixed = _mix(carried, _blend(channel, earlier, gate), biases[:, :, index])
        return mixed

    def _mix_statically(self, sampled: Tensor, mixed: Tensor) -> Tensor:
        """The adapters of every reused filter in turn, without the filters."""
        carried = sampled
        for adapter in self.adapters:
            carried = adapter(mixed, carried)
            mixed = F.layer_norm(carried, carried.shape[-2:], eps=_NORM_EPSILON).relu_()
        return mixed

    def gate_factors(self, generated: Tensor) -> Tensor:
        """Factors of the gates of reused channel filters.

        Args:
            generated: what `channel_gates` makes of the queries, [R, 2 * C * J].

        Returns:
            [R, G, 2, J, D]: first over output, then over input channels. A filter's gate for a pair
            of channels is the product of the two.
        """
        shape = (self.shape.width, 2, self.shape.reused)
        return self._grouped(generated).unflatten(-1, shape).movedim(2, -1).contiguous().sigmoid()

    def _reuse_spatial(self, own: Tensor, queries: Tensor, bank: FilterBank) -> Tensor:
        """Own spatial filters [R, G, O / 2, N], and the same blended with earlier ones: O."""
        assert self.pattern_gate is not None
        assert self.point_gate is not None
        assert bank.spatial is not None
        by_pattern = self._grouped(self.pattern_gate(queries)).sigmoid().unsqueeze(-1)
        by_point = self._grouped(self.point_gate(queries)).sigmoid().unsqueeze(-2)
        earlier = bank.spatial[:, :, : own.shape[2]]
        return torch.cat([own, _blend(own, earlier, by_pattern * by_point)], dim=2)

    def _grouped(self, generated: Tensor) -> Tensor:
        """[R, G * X] as [R, G, X]."""
        return generated.unflatten(-1, (self.shape.groups, -1))


def _blend(own: Tensor, earlier: Tensor, gate: Tensor) -> Tensor:
    """(1 - gate) * own + gate * earlier; in the gate's memory if gradients are off."""
    if torch.compiler.is_exporting():  # ONNX has no lerp: it would become a choice of two formulas
        return own + gate * (earlier - own)
    return torch.lerp(own, earlier, gate, out=None if torch.is_grad_enabled() else gate)


def _mix(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Batched matrix product, bias, LayerNorm and ReLU.

    The LayerNorm goes over points (or patterns) and channels together and has no affine part.

    Args:
        left: [R, G, M, K].
        right: [R, G, K, D].
        bias: added to the product, [R, G, M, 1] or [R, G, 1, D].
    """
    x = left @ right
    # Only on a CPU, where memory access dominates. Other runtimes have a LayerNorm in one piece.
    eager = not (torch.is_grad_enabled() or torch.compiler.is_exporting())
    if eager and x.device.type == "cpu" and x.dtype.itemsize >= 4:
        return _normalize_in_place(x, bias)
    x = x if bias is None else x.add_(bias)
    return F.layer_norm(x, x.shape[-2:], eps=_NORM_EPSILON).relu_()


def _normalize_in_place(x: Tensor, bias: Tensor | None) -> Tensor:
    """Bias, LayerNorm over the last two dimensions and ReLU, all in place on `x`."""
    shift = -x.mean((-2, -1), keepdim=True)
    if bias is not None:
        shift = shift + bias - bias.mean((-2, -1), keepdim=True)
    norm = torch.linalg.vector_norm(x.add_(shift), dim=(-2, -1), keepdim=True)
    count = x.shape[-2] * x.shape[-1]
    return x.relu_().mul_((norm.square() / count + _NORM_EPSILON).rsqrt())
