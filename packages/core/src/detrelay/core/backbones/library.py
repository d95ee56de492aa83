"""Backbones of other libraries. Their maps are inferred from a run on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detrelay.core.backbones.base import Backbone, BackboneSettings

# A multiple of 7 and of 64: patches of 4, 8, 14, 16 or 32 pixels fill an image of this side
_PROBE_SIDE = 448
_FINEST_STRIDE = 4


@dataclass(frozen=True)
class _Stage:
    """The output of one stage of a network.

    Attributes:
        index: its position among the stages.
        channels: of its map.
        stride: of its map, pixels.
        parameters: names of the parameters the map depends on.
    """

    index: int
    channels: int
    stride: int
    parameters: frozenset[str]


class LibraryBackbone(Backbone):
    """A network of another library with random weights.

    Where its stages halve the resolution, the last map of each stride from 4 on is taken. Where all
    have one stride, as in a plain vision transformer, a simple feature pyramid is built on the last
    one. Parameters that no map depends on are frozen, so that no process waits for their gradients.
    `frozen_stages` freezes the parameters that the map of the last frozen stage depends on; each
    layer of a plain vision transformer is a stage.

    Args:
        name: "LIBRARY/MODEL".
        settings: norms, frozen stages, number of maps, and options of the network.

    Raises:
        ValueError: the library has no such network, it rejects an option, or the network has too
            few stages.
    """

    library: ClassVar[str]

    def __init__(self, name: str, settings: BackboneSettings) -> None:
        self.model = name.removeprefix(f"{self.library}/")
        options = dict(settings.options)
        with torch.device("meta"):
            network = self._checked_network(name, options, None)
            stages = _survey(self, network)
        if not 0 <= settings.frozen_stages <= len(stages):
            raise ValueError(
                f"backbone_frozen_stages must lie in 0..{len(stages)} for {name}; found "
                f"{settings.frozen_stages}"
            )
        is_plain = len({stage.stride for stage in stages}) == 1
        chosen = [stages[-1]] if is_plain else _one_of_each_stride(stages)[: settings.num_stages]
        if is_plain:
            width, stride = stages[-1].channels, stages[-1].stride
            all_channels = _PlainPyramid.channels_of(width)[: settings.num_stages]
            all_strides = [stride / 4, stride / 2, stride, 2 * stride][: settings.num_stages]
        else:
            all_channels = [stage.channels for stage in chosen]
            all_strides = [float(stage.stride) for stage in chosen]
        count = len(all_channels) if settings.num_maps is None else settings.num_maps
        if count > len(all_channels):
            raise ValueError(
                f"{name} gives maps of strides {[round(s, 1) for s in all_strides]}, but the head "
                f"needs {count}"
            )
        super().__init__(name, all_channels[-count:], [_whole(s) for s in all_strides[-count:]])
        chosen = chosen if is_plain else chosen[-count:]
        self.norm = settings.norm
        self.network = self._network(options, [stage.index for stage in chosen])
        self.pyramid = (
            _PlainPyramid(stages[-1].channels, count, len(all_channels)) if is_plain else None
        )
        # so that an image covers a whole number of cells on every level
        self.divisor = int(max(all_strides))
        used = frozenset[str]().union(*(stage.parameters for stage in chosen))
        frozen = stages[settings.frozen_stages - 1].parameters if settings.frozen_stages else ()
        # the norm of a map affects no later one, and is trained
        self._trained = used.difference(stages[-1].parameters.intersection(frozen))
        self.freeze()
        for module in self.network.modules():
            # entries that are not saved would be reloaded as uninitialised memory
            module._non_persistent_buffers_set.clear()

    def _checked_network(
        self, name: str, options: Mapping[str, Any], indices: Sequence[int] | None
    ) -> nn.Module:
        try:
            return self._network(options, indices)
        except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
            raise ValueError(f"backbone {name} with options {dict(options)}: {error}") from error

    def _network(self, options: Mapping[str, Any], indices: Sequence[int] | None) -> nn.Module:
        """The network with random weights, whose stages `indices` are returned; None for all."""
        raise NotImplementedError

    def _maps(self, network: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The maps [B, C, H, W] of the stages that the network returns."""
        raise NotImplementedError

    def _take(self, theirs: Mapping[str, Tensor]) -> None:
        """Copy the entries of a network of the same type."""
        ours = self.network.state_dict()
        buffers = {name for name, _ in self.network.named_buffers()}
        wrong = sorted(
            name
            for name, value in ours.items()
            if (name not in theirs and name not in buffers)
            or (name in theirs and theirs[name].shape != value.shape)
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} entries are missing or of another shape, such as {wrong[0]}"
            )
        self.network.load_state_dict({k: v for k, v in theirs.items() if k in ours}, strict=False)

    def freeze(self) -> None:
        """Freeze what no map depends on, frozen stages, and affine parameters of norms as set."""
        for name, parameter in self.network.named_parameters():
            if name not in self._trained:
                parameter.requires_grad_(False)
        if self.norm == "frozen":
            for module in self._norms():
                module.requires_grad_(False)

    def _norms(self) -> list[_BatchNorm]:
        return [module for module in self.modules() if isinstance(module, _BatchNorm)]

    def train(self, mode: bool = True) -> LibraryBackbone:
        """Switch to training, except for norms whose statistics are fixed."""
        super().train(mode)
        for module in self._norms():
            is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
            if self.norm != "train" or is_frozen:
                module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of [B, 3, H, W]: one [B, channels[i], H / strides[i], ...] per map."""
        maps = self._maps(self.network, pixel_values)
        return maps if self.pyramid is None else self.pyramid(maps[-1])


def _survey(backbone: LibraryBackbone, network: nn.Module) -> list[_Stage]:
    """The outputs of the stages of a network on the meta device."""
    network.eval()
    with torch.enable_grad():
        maps = backbone._maps(network, torch.zeros(1, 3, _PROBE_SIDE, _PROBE_SIDE))
        stages = []
        for index, level in enumerate(maps):
            network.zero_grad(set_to_none=True)
            level.sum().backward(retain_graph=True)
            names = [name for name, p in network.named_parameters() if p.grad is not None]
            stride = _PROBE_SIDE // level.shape[-1]
            stages.append(_Stage(index, level.shape[1], stride, frozenset(names)))
    return stages


def _one_of_each_stride(stages: Sequence[_Stage]) -> list[_Stage]:
    last = {stage.stride: stage for stage in stages if stage.stride >= _FINEST_STRIDE}
    return list(last.values())


def _whole(stride: float) -> float:
    return int(stride) if stride == int(stride) else stride


class _PlainPyramid(nn.Module):
    """Maps of 4, 2, 1 and 1/2 times the resolution of one map.

    Args:
        width: channels of the map.
        num_maps: how many to make, counted from the coarsest.
        num_stages: how many there would be, counted from the finest.

    Reference:
        Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022.
    """

    @staticmethod
    def channels_of(width: int) -> list[int]:
        """Channels of the four maps, finest first."""
        return [width // 4, width // 2, width, width]

    def __init__(self, width: int, num_maps: int, num_stages: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        ways = [
            nn.Sequential(
                nn.ConvTranspose2d(width, half, 2, stride=2),
                _ChannelNorm(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, stride=2),
            ),
            nn.Sequential(nn.ConvTranspose2d(width, half, 2, stride=2)),
            nn.Identity(),
            nn.MaxPool2d(2),
        ]
        self.ways = nn.ModuleList(ways[num_stages - num_maps : num_stages])

    def forward(self, level: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] -> the maps, finest first."""
        return tuple(way(level) for way in self.ways)


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, level: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        moved = level.movedim(1, -1)
        return F.layer_norm(moved, self.normalized_shape, self.weight, self.bias, self.eps).movedim(
            -1, 1
        )
