"""When a faster way of computing the same may be taken."""

from __future__ import annotations

import torch
from torch import Tensor


def runs_at_once_on_cpu(x: Tensor) -> bool:
    """Whether operations on `x` run at once, on a CPU, in its own dtype.

    So there is no autocast, and no compiler, exporter or tracer that looks on.
    """
    return bool(
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch declares no exports
    )
