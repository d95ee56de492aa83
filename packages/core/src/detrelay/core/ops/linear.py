"""Linear layers, by the faster of two kernels that give the same numbers up to rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.ops.eager import runs_at_once_on_cpu

_WIDE = 16  # outputs per input


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, for wide outputs through oneDNN in float32 on a CPU.

    A hundred rows of 256 inputs to 24576 outputs took oneDNN 0.8 of the time of the BLAS that torch
    calls; up to eight outputs per input the BLAS was faster (docs/log.md). The rule: at least
    sixteen outputs per input, a CPU, float32 throughout and no autocast, no gradient, no tracing,
    and dense weights (oneDNN falls back to a slow reference kernel on strided ones).

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O].
    """
    if weight.shape[0] >= _WIDE * weight.shape[1] and _suits_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return bool(
        not torch.is_grad_enabled()
        and runs_at_once_on_cpu(x)
        and x.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
