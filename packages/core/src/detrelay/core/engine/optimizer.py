"""AdamW over parameter groups, and a scheduler that depends on the step alone."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from detrelay.core.recipes.recipe import TrainConfig

_BETAS = (0.9, 0.999)
# "layer3" as torchvision counts the stages of a ResNet, from 1; "layers.2" as transformers counts
# those of Swin, from 0, and "stage3", the norms of its outputs, from 1
_STAGE = re.compile(r"\b(?:layer|stage)(?P<from_one>\d)\b|\blayers\.(?P<from_zero>\d)\b")


def parameter_groups(model: nn.Module, settings: TrainConfig) -> list[dict[str, object]]:
    """Trained parameters, grouped by learning rate and weight decay.

    A parameter's rate is multiplied by every multiplier whose key is part of its name; it has no
    weight decay if its name contains an entry of `no_decay`. With `layer_decay` d, the last of S
    backbone stages gets another factor d, the one before d^2, and what comes before the first stage
    d^(S + 1). Frozen parameters are left out.

    Returns:
        Groups for `torch.optim`, in order of first appearance, each with its own `base_lr`.

    Raises:
        ValueError: a key matches no parameter, nothing is left to train, or the backbone has no
            distinguishable stages.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if not named:
        raise ValueError("the model has no parameter to train: everything is frozen")
    # a key that matches only frozen parameters is no mistake: freezing the backbone leaves its rate
    # unused
    names = [name for name, _ in model.named_parameters()]
    _check_keys("train.lr_multipliers", settings.lr_multipliers, names)
    _check_keys("train.no_decay", settings.no_decay, names)
    depths = _depths([name for name, _ in named]) if settings.layer_decay != 1 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        rate = settings.learning_rate * settings.layer_decay ** depths.get(name, 0)
        for key, factor in settings.lr_multipliers.items():
            rate *= factor if _holds(name, key) else 1.0
        decayed = not any(_holds(name, key) for key in settings.no_decay)
        decay = settings.weight_decay if decayed else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW as in the published runs."""
    groups = parameter_groups(model, settings)
    return torch.optim.AdamW(groups, betas=_BETAS, eps=settings.adam_epsilon, fused=True)


def warmup_steps(steps_per_epoch: int, settings: TrainConfig) -> int:
    """Number of warm-up steps: a share of the run, rounded up, or a fixed number."""
    if settings.warmup_share == 0:
        return settings.warmup_steps
    return math.ceil(settings.warmup_share * settings.epochs * steps_per_epoch)


def learning_rate_factor(step: int, steps_per_epoch: int, settings: TrainConfig) -> float:
    """The scheduler: a factor on every learning rate at a step, counted from 0.

    A linear warm-up from `warmup_factor`, times `gamma` for each milestone passed; or, from the end
    of the warm-up to the end of the last epoch, half a cosine from 1 to 0. It keeps no state, so a
    resumed run has none to restore.
    """
    factor = 1.0
    warmup = warmup_steps(steps_per_epoch, settings)
    if settings.schedule == "multi_step":
        factor = settings.gamma ** bisect_right(settings.milestones, step // steps_per_epoch)
    elif step > warmup:
        falling = settings.epochs * steps_per_epoch - warmup
        factor = (1 + math.cos(math.pi * (step - warmup) / falling)) / 2
    if step < warmup:
        remaining = 1 - step / warmup
        factor *= 1 - remaining * (1 - settings.warmup_factor)
    return factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale the base rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def _holds(name: str, key: str) -> bool:
    return fnmatchcase(name, f"*{key}*")


def _depths(names: Sequence[str]) -> dict[str, int]:
    """Depth of the backbone's parameters below the head: 1 for those of its last stage."""
    stages = {}
    for name in names:
        if name.startswith("backbone."):
            found = _STAGE.search(name)
            # parameters outside all stages come before the first
            stages[name] = 0 if found is None else _number(found)
    last = max(stages.values(), default=0)
    if stages and last == 0:
        raise ValueError(
            "train.layer_decay: the names of the trained backbone parameters tell no stages apart; "
            "set it to 1, or name factors in train.lr_multipliers"
        )
    return {name: last + 1 - stage for name, stage in stages.items()}


def _number(found: re.Match[str]) -> int:
    from_zero = found["from_zero"]
    return int(found["from_one"]) if from_zero is None else int(from_zero) + 1


def _check_keys(option: str, keys: Iterable[str], names: Sequence[str]) -> None:
    for key in keys:
        if not any(_holds(name, key) for name in names):
            raise ValueError(
                f"{option}: {key!r} is part of no parameter's name, such as {names[0]}"
            )
