"""Collate encoded images into one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from detrelay.core.data.sizes import DIVISOR as DIVISOR
from detrelay.core.data.sizes import padded_size as padded_size


class EncodedSample(TypedDict):
    """One image as the model takes it.

    Attributes:
        pixel_values: float32 [3, h, w], normalised, or uint8, for `normalize_batch`.
        labels: `class_labels` int64 [n], `boxes` float32 [n, 4] cxcywh in [0, 1] of the unpadded
            image, `image_id` int64 [1], `orig_size` and `size` int64 [2] (height, width) of the
            image as stored and as encoded, pixels.
    """

    pixel_values: Tensor
    labels: dict[str, Tensor]


class Batch(TypedDict):
    """Images padded to one size.

    Attributes:
        pixel_values: float32 [B, 3, H, W], or uint8, zero where padded.
        pixel_mask: bool [B, H, W], True where a pixel is real.
        labels: one mapping per image, as in `EncodedSample`.
    """

    pixel_values: Tensor
    pixel_mask: Tensor
    labels: list[dict[str, Tensor]]


def collate(items: Sequence[EncodedSample], *, divisor: int = DIVISOR) -> Batch:
    """Pad images at the bottom and the right to one size; labels stay as they are.

    The batch keeps the order in memory of its first image: decoded and resized bytes are
    channels-last, and are copied row by row.

    Boxes are in units of the unpadded image, so no label depends on the rest of the batch.

    Args:
        items: at least one image.
        divisor: height and width of the batch are multiples of it, pixels.
    """
    images = [item["pixel_values"] for item in items]
    height, width = padded_size([(image.shape[-2], image.shape[-1]) for image in images], divisor)
    # each entry is written once; zeroing all of it first would be another pass over memory
    pixel_values = _empty_canvas(images, height, width)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.bool)
    for image, pixels, mask in zip(images, pixel_values, pixel_mask, strict=True):
        bottom, right = image.shape[-2:]
        pixels[:, :bottom, :right] = image
        pixels[:, bottom:] = 0
        pixels[:, :bottom, right:] = 0
        mask[:bottom, :right] = True
    return {
        "pixel_values": pixel_values,
        "pixel_mask": pixel_mask,
        "labels": [item["labels"] for item in items],
    }


def _empty_canvas(images: Sequence[Tensor], height: int, width: int) -> Tensor:
    first, channels = images[0], images[0].shape[0]
    if first.stride(0) == 1:
        return first.new_empty(len(images), height, width, channels).permute(0, 3, 1, 2)
    return first.new_empty(len(images), channels, height, width)
