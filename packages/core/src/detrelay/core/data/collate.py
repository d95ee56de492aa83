"""From single encoded images to one padded batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def padded_size(sizes: Iterable[tuple[int, int]], divisor: int) -> tuple[int, int]:
    """The (height, width) of a batch: its largest sides, rounded up to multiples of `divisor`.

    Args:
        sizes: (height, width) of each image, pixels.
        divisor: what both sides must be a multiple of, pixels; 1 pads to the largest image only.
    """
    heights, widths = zip(*sizes, strict=True)
    return (
        -(-max(heights) // divisor) * divisor,
        -(-max(widths) // divisor) * divisor,
    )


def collate(items: Sequence[Mapping[str, Any]], *, divisor: int = 32) -> dict[str, Any]:
    """Pad images at the bottom and the right to one size; labels stay as they are.

    Boxes are in units of the unpadded image, so no label depends on the rest of the batch.

    Args:
        items: one mapping an image with `pixel_values` float [3, h, w] and `labels`.
        divisor: what height and width of the batch must be a multiple of, pixels.

    Returns:
        `pixel_values` [B, 3, H, W], zero where padded; `pixel_mask` int64 [B, H, W], 1 where a
        pixel is real; `labels`, a list of B.
    """
    images: list[Tensor] = [item["pixel_values"] for item in items]
    height, width = padded_size([(image.shape[-2], image.shape[-1]) for image in images], divisor)
    pixel_values = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for row, image in enumerate(images):
        pixel_values[row, :, : image.shape[-2], : image.shape[-1]] = image
        pixel_mask[row, : image.shape[-2], : image.shape[-1]] = 1
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "labels": [item["labels"] for item in items],
    }
