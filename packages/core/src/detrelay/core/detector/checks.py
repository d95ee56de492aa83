"""Input checks: one clear error instead of a kernel's, or of a silently wrong result.

Shapes and types are always checked. Values are read only where that is free: on a CPU, or where
training waits for the device anyway (denoising and criterion call `Targets.check`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from detrelay.core.structures import Targets


def check_input(pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
    """Reject pixels and masks that no detector can read.

    Args:
        pixel_values: must be float [B, 3, H, W].
        pixel_mask: must be [B, H, W], with the real pixels of every image in its top left corner;
            its values are read only on a CPU.

    Raises:
        TypeError: pixels that are not floating point.
        ValueError: another shape, no image, or an image without a real pixel in its corner.
    """
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(
            f"pixel_values must be [B, 3, H, W] with at least one image, found {list(shape)}; the "
            f"image processor makes them from images of any kind"
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"pixel_values must be floating point and normalised, found {pixel_values.dtype}; the "
            f"image processor makes them from images"
        )
    if pixel_mask is None:
        return
    expected = (shape[0], *shape[2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(
            f"pixel_mask must be [B, H, W] = {list(expected)} as pixel_values are, found "
            f"{list(pixel_mask.shape)}"
        )
    if _can_be_read(pixel_mask):
        real = pixel_mask[:, 0, 0].bool()
        if not real.all():
            images = (~real).nonzero().flatten().tolist()
            raise ValueError(
                f"pixel_mask must be 1 on the real pixels, which fill the top left corner; that of "
                f"images {images} of the batch is 0 there"
            )


def check_targets(targets: Targets, batch_size: int, num_classes: int) -> None:
    """Reject targets that do not belong to the images, or that no image can have.

    Args:
        targets: objects of the batch; their values are read only on a CPU.
        batch_size: B.
        num_classes: K.

    Raises:
        ValueError: another batch size, a label outside the classes, or an invalid box.
    """
    if targets.batch_size != batch_size:
        raise ValueError(
            f"targets are of {targets.batch_size} images, pixel_values of {batch_size}"
        )
    if _can_be_read(targets.boxes):
        targets.check(num_classes)


def _can_be_read(tensor: Tensor) -> bool:
    """Whether reading values is free: no device to wait for, no graph being traced."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
    )
