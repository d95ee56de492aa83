"""AdamW over parameter groups, and a learning rate that is a function of the step alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import torch
from torch import nn

from detrelay.core.configs import TrainConfig

_BETAS = (0.9, 0.999)
# The published runs divide by max(sqrt(v), 1e-10): parameters with small gradients keep moving.
_EPSILON = 1e-10


def parameter_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, object]]:
    """Trained parameters, grouped by learning rate and weight decay.

    A parameter takes the product of the multipliers whose key its name holds, and no decay if its
    name holds an entry of `no_decay`. Frozen parameters are left out.

    Returns:
        Groups for `torch.optim`, in order of first appearance, each with its own `base_lr`.

    Raises:
        ValueError: a key names no trained parameter, or nothing is left to train.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if not named:
        raise ValueError("the model has no parameter to train: everything is frozen")
    _check_keys("train.lr_multipliers", settings.lr_multipliers, [name for name, _ in named])
    _check_keys("train.no_decay", settings.no_decay, [name for name, _ in named])
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        rate = settings.learning_rate
        for key, factor in settings.lr_multipliers.items():
            rate *= factor if key in name else 1.0
        decayed = not any(key in name for key in settings.no_decay)
        decay = settings.weight_decay if decayed else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW as in the published runs."""
    groups = parameter_groups(model, settings)
    return torch.optim.AdamW(groups, betas=_BETAS, eps=_EPSILON, fused=True)


def learning_rate_factor(step: int, steps_per_epoch: int, settings: TrainConfig) -> float:
    """Factor on every learning rate at a step, counted from 0.

    A linear climb from `warmup_factor` over `warmup_steps`, times `gamma` for each milestone that
    lies behind. Nothing is remembered between steps, so a resumed run needs no state for it.
    """
    drops = bisect_right(settings.milestones, step // steps_per_epoch)
    factor = settings.gamma**drops
    if step < settings.warmup_steps:
        remaining = 1 - step / settings.warmup_steps
        factor *= 1 - remaining * (1 - settings.warmup_factor)
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's own base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _check_keys(option: str, keys: Iterable[str], names: list[str]) -> None:
    for key in keys:
        if not any(key in name for name in names):
            raise ValueError(
                f"{option}: {key!r} is part of no trained parameter's name, such as {names[0]}"
            )
