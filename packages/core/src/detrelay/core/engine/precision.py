"""Whether a low precision pays on the machine at hand."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def check_precision(accelerator: Accelerator) -> None:
    """Refuse to train in float16 on a CPU.

    Raises:
        ValueError: the precision is fp16 and the device a CPU, whose float16 gradients vanish
            without the scaler that only GPUs have.
    """
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError(
            "train.mixed_precision=fp16 needs a GPU, found a CPU; set train.mixed_precision=no, "
            "or bf16"
        )


def precision_note(accelerator: Accelerator) -> str | None:
    """What to know about bfloat16 on a CPU for which torch has no kernels; None if nothing.

    There steps take many times as long as in float32 (docs/log.md).
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
