"""How far the gates of a StageInteractor let reused filters in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from detrelay.heads.stageinteractor.mixing import DynamicMixing

Kind = Literal["channel", "spatial"]


@dataclass(slots=True, eq=False)
class FilterGate:
    """How far one stage's own filters are replaced by those of an earlier stage.

    Attributes:
        stage: index of the stage that mixes.
        source: index of the stage whose filter is reused.
        kind: which filters.
        parts: for each pass of the model float32 [R], the mean gate of each query: 0 for its own
            filter, 1 for the earlier one, 0.25 before any training.
    """

    stage: int
    source: int
    kind: Kind
    parts: list[Tensor] = field(default_factory=list)

    def by_query(self, queries: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The gates [I, Q] of I images of Q queries, in the order of the passes."""
        return torch.cat(self.parts).view(-1, queries).numpy()


@contextmanager
def watched_gates(model: nn.Module) -> Iterator[list[FilterGate]]:
    """Record the gates of every pass of the model; none if no filter is reused."""
    mixings = [module for module in model.modules() if isinstance(module, DynamicMixing)]
    gates: list[FilterGate] = []
    handles = []
    for stage, mixing in enumerate(mixings):
        if mixing.channel_gates is not None:
            # the newest J filters of the bank, oldest first
            count = mixing.shape.reused
            own = [FilterGate(stage, stage - count + index, "channel") for index in range(count)]
            gates += own
            handles.append(mixing.channel_gates.register_forward_hook(_keep_channel(mixing, own)))
        if mixing.pattern_gate is not None and mixing.point_gate is not None:
            gate = FilterGate(stage, stage - 1, "spatial")
            gates.append(gate)
            patterns: list[Tensor] = []
            handles.append(mixing.pattern_gate.register_forward_hook(_put_aside(patterns)))
            handles.append(
                mixing.point_gate.register_forward_hook(_keep_spatial(mixing, patterns, gate))
            )
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _keep_channel(mixing: DynamicMixing, gates: list[FilterGate]) -> Any:
    def keep(_module: nn.Module, _given: object, generated: Tensor) -> None:
        # the mean of all products of two factors is the product of their means
        by_group = mixing.gate_factors(generated.detach()).mean(dim=-1).prod(dim=2)  # [R, G, J]
        for gate, values in zip(gates, by_group.mean(dim=1).unbind(-1), strict=True):
            gate.parts.append(values.float().cpu())

    return keep


def _put_aside(values: list[Tensor]) -> Any:
    def keep(_module: nn.Module, _given: object, generated: Tensor) -> None:
        values[:] = [generated.detach()]

    return keep


def _keep_spatial(mixing: DynamicMixing, patterns: list[Tensor], gate: FilterGate) -> Any:
    def keep(_module: nn.Module, _given: object, generated: Tensor) -> None:
        factors = [
            values.unflatten(-1, (mixing.shape.groups, -1)).sigmoid().mean(dim=-1)
            for values in (patterns[0], generated.detach())
        ]
        gate.parts.append((factors[0] * factors[1]).mean(dim=1).float().cpu())

    return keep
