"""Deterministic weights and inputs of the reference runs: made by rule, so nothing is stored."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def unit(key: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Uniform float32 numbers of zero mean and unit variance, seeded by the key."""
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    uniform = torch.rand(count, generator=generator, dtype=torch.float32)
    return ((uniform - 0.5) * 3.4641016151377544).reshape(shape)


def stageinteractor_value(key: str, shape: tuple[int, ...], is_norm: bool) -> Tensor:
    """Value of an official StageInteractor checkpoint entry in the reference runs."""
    u = unit(key, shape)
    if key.endswith("running_var"):
        return 1 + 0.1 * u.abs()
    if key.endswith("running_mean"):
        return 0.1 * u
    if key.endswith("init_content_features.weight"):
        return u
    if key.endswith("iof_tau"):
        return 2 + 0.5 * u
    if len(shape) >= 2:
        gain = 0.4 if ".fc_reg." in key else 0.25 if ".feat_extractor." in key else 1
        return u * (gain / math.sqrt(math.prod(shape[1:])))
    if is_norm:
        return 1 + 0.05 * u
    if key.endswith("fc_cls.bias"):
        return -2 + 0.3 * u
    if key.endswith("fc_reg.bias"):
        return 0.1 * u + torch.tensor([0, 0, -0.5, 0])
    if ".feat_extractor." in key:
        return 0.3 * u
    return 0.1 * u
