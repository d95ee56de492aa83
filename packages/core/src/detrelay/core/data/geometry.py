"""Resize and crop images together with their boxes.

All randomness comes from torch's default CPU generator, so the same generator state gives the same
result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.coco import Sample
from detrelay.core.data.sizes import resized_shape as resized_shape

# background of a mosaic
_GREY = 114


def make_mosaic(samples: Sequence[Sample], tile: int) -> Sample:
    """Four images that meet at a random point of a grey canvas of twice the side of a tile.

    Each is fitted into a tile; anything outside the canvas is cropped, boxes too. Id and original
    size are those of the first image.

    Args:
        samples: four samples: above left, above right, below left, below right.
        tile: side of a tile, pixels.

    Reference:
        Bochkovskiy et al., YOLOv4 (arXiv 2004.10934), section 3.3.
    """
    row, column = (int(torch.randint(tile // 2, tile + tile // 2 + 1, ())) for _ in range(2))
    canvas = torch.full((3, 2 * tile, 2 * tile), _GREY, dtype=torch.uint8)
    boxes = []
    for place, sample in enumerate(samples):
        placed = scale(sample, tile / max(sample.image.shape[-2:]))
        height, width = placed.image.shape[-2:]
        top = row if place >= 2 else row - height
        left = column if place % 2 else column - width
        window = canvas[:, max(top, 0) : top + height, max(left, 0) : left + width]
        seen = placed.image[:, max(-top, 0) :, max(-left, 0) :]
        window.copy_(seen[:, : window.shape[1], : window.shape[2]])
        boxes.append(placed.boxes_xyxy + placed.boxes_xyxy.new_tensor([left, top, left, top]))
    whole = replace(
        samples[0],
        image=canvas,
        boxes_xyxy=torch.cat(boxes),
        class_labels=torch.cat([sample.class_labels for sample in samples]),
    )
    return cut(whole, 0, 0, 2 * tile, 2 * tile)


def mix(first: Sample, second: Sample) -> Sample:
    """Blend two images (mixup), keeping the boxes of both, each with full weight.

    They are aligned at the upper left corner of a black canvas that fits both; the share of the
    first is drawn from Beta(1.5, 1.5). Id and original size are those of the first image.

    Reference:
        Zhang et al., Bag of Freebies for Training Object Detection (arXiv 1902.04103), section 3.1.
    """
    share = float(torch.distributions.Beta(1.5, 1.5).sample())
    shapes = [sample.image.shape[-2:] for sample in (first, second)]
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    canvas = torch.zeros(3, height, width)
    for sample, weight in ((first, share), (second, 1 - share)):
        h, w = sample.image.shape[-2:]
        canvas[:, :h, :w] += weight * sample.image
    return replace(
        first,
        image=canvas.round().to(torch.uint8),
        boxes_xyxy=torch.cat([first.boxes_xyxy, second.boxes_xyxy]),
        class_labels=torch.cat([first.class_labels, second.class_labels]),
    )


def on_both(function: Callable[..., Any], sample: Sample, *arguments: Any) -> Sample:
    """Apply a torchvision function to the image and to the boxes."""
    size = (sample.image.shape[-2], sample.image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(
        sample.boxes_xyxy, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
    )
    return replace(
        sample,
        image=function(sample.image, *arguments),
        boxes_xyxy=function(boxes, *arguments).as_subclass(torch.Tensor),
    )


def turn_left(sample: Sample, times: int) -> Sample:
    """Rotate image and boxes by so many times 90 degrees, anticlockwise."""
    image, boxes = sample.image, sample.boxes_xyxy
    for _ in range(times):
        left, top, right, bottom = boxes.unbind(-1)
        width = image.shape[-1]
        boxes = torch.stack([top, width - right, bottom, width - left], dim=-1)
        image = image.rot90(1, (-2, -1))
    return replace(sample, image=image.contiguous(), boxes_xyxy=boxes)


def resize(sample: Sample, short_side: int, max_size: int | None) -> Sample:
    """Resize a sample to `resized_shape`."""
    height, width = sample.image.shape[-2:]
    return resize_to(sample, resized_shape(height, width, short_side, max_size))


def resize_to(sample: Sample, shape: tuple[int, int]) -> Sample:
    """Resize a sample to a (height, width), pixels."""
    if shape == tuple(sample.image.shape[-2:]):
        return sample
    return on_both(tv_functional.resize, sample, list(shape))


def scale(sample: Sample, factor: float) -> Sample:
    """Multiply both sides of a sample by a number."""
    height, width = (max(1, round(side * factor)) for side in sample.image.shape[-2:])
    return resize_to(sample, (height, width))


def random_crop(sample: Sample, smallest: int, largest: int) -> Sample:
    """Crop a window whose sides are uniform in [smallest, largest], bounded by the image."""
    height, width = sample.image.shape[-2:]
    window = [
        int(torch.randint(min(smallest, side), min(largest, side) + 1, ()))
        for side in (height, width)
    ]
    top = int(torch.randint(height - window[0] + 1, ()))
    left = int(torch.randint(width - window[1] + 1, ()))
    return cut(sample, top, left, window[0], window[1])


def cut(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Crop a window of the image, with the boxes clipped to it."""
    image = tv_functional.crop(sample.image, top, left, height, width)
    offset = sample.boxes_xyxy.new_tensor([left, top, left, top])
    limit = sample.boxes_xyxy.new_tensor([width, height]).repeat(2)
    boxes = torch.minimum((sample.boxes_xyxy - offset).clamp(min=0), limit)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(
        sample, image=image, boxes_xyxy=boxes[keep], class_labels=sample.class_labels[keep]
    )
