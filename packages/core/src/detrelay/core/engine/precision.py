"""Low precision: what a recipe asks for, and whether it makes sense on this machine."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def check_precision(accelerator: Accelerator) -> None:
    """Reject training in float16 on a CPU.

    Raises:
        ValueError: the precision is fp16 and the device a CPU, where float16 gradients vanish
            without the scaler that only GPUs have.
    """
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "train.mixed_precision=fp16 needs a GPU, found a CPU; set train.mixed_precision=no, "
            "or bf16"
        )


def allow_tf32(allowed: bool | None) -> None:
    """Let float32 products and convolutions on NVIDIA GPUs round to TF32, or forbid it.

    Args:
        allowed: None leaves both as they are. The setting is one of the process.
    """
    if allowed is not None:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def precision_note(accelerator: Accelerator) -> str | None:
    """A note on bfloat16 for a CPU without torch kernels for it; None if it does not apply.

    On such CPUs steps take many times as long as in float32 (docs/log.md).
    """
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16":
        return None
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or supported():  # a build of torch without oneDNN does not say
        return None
    return (
        "note: torch has no bfloat16 kernels for this CPU, so train.mixed_precision=bf16 is many "
        "times as slow as float32; train.mixed_precision=no is the faster choice here"
    )
