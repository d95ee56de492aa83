"""Preprocessing for exported detectors: the image processor's steps in numpy and Pillow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detrelay.core.data.decode import Pixels, array_to_pixels, image_to_pixels, read_pixels
from detrelay.core.data.sizes import padded_size, resized_shape

# an image in any form that does not need torch
AnyImage = str | os.PathLike[str] | Image.Image | NDArray[Any]


@dataclass(frozen=True)
class PixelSettings:
    """The preprocessing of an image, as set in an image processor.

    Attributes:
        shortest_edge: the short side after resizing, pixels; None with `height` and `width`.
        longest_edge: limit of the long side, pixels.
        height: a fixed height instead of these two, pixels; None with `shortest_edge`.
        width: a fixed width, likewise.
        resample: Pillow's number of the filter; None does not resize.
        scale: factor for values 0..255.
        mean: subtracted from each channel after that.
        std: divides each channel.
        pad_size_divisor: height and width of a batch are multiples of it, pixels.
        max_pixels: maximum number of pixels of an image.
        nms_iou_threshold: see `DetrelayImageProcessor`.
    """

    shortest_edge: int | None
    longest_edge: int | None
    height: int | None
    width: int | None
    resample: int | None
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad_size_divisor: int
    max_pixels: int
    nms_iou_threshold: float | None

    @classmethod
    def of(cls, processor: Any) -> PixelSettings:
        """The settings of a `DetrelayImageProcessor`.

        Raises:
            ValueError: it does something that an exported detector cannot do.
        """
        if not processor.do_pad or processor.pad_size:
            raise ValueError("do_pad=False and pad_size of an image processor cannot be exported")
        if processor.do_center_crop:
            raise ValueError("do_center_crop of an image processor cannot be exported")
        size = processor.size
        sides = {"shortest_edge", "longest_edge"} if size.shortest_edge else {"height", "width"}
        if processor.do_resize and not set(dict(size)) <= sides:
            raise ValueError(f"the size {dict(size)} of an image processor cannot be exported")
        normalize = processor.do_normalize
        return cls(
            shortest_edge=size.shortest_edge,
            longest_edge=size.longest_edge,
            height=size.height,
            width=size.width,
            resample=int(processor.resample) if processor.do_resize else None,
            scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=_three(processor.image_mean) if normalize else (0.0, 0.0, 0.0),
            std=_three(processor.image_std) if normalize else (1.0, 1.0, 1.0),
            pad_size_divisor=processor.pad_size_divisor,
            max_pixels=processor.max_pixels,
            nms_iou_threshold=processor.nms_iou_threshold,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PixelSettings:
        """The settings from `to_dict`."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})

    def to_dict(self) -> dict[str, Any]:
        """The settings for json."""
        return asdict(self)


def read_any(image: AnyImage, max_pixels: int) -> Pixels:
    """An image as uint8 [H, W, 3], by the rules of `detrelay.core.data.decode`.

    Raises:
        ImageError: it cannot be read.
        TypeError: it is not an image.
    """
    if isinstance(image, str | os.PathLike):
        return read_pixels(Path(image), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        return image_to_pixels(image, max_pixels=max_pixels)
    if isinstance(image, np.ndarray):
        return array_to_pixels(image)
    raise TypeError(
        f"an image must be a path, a Pillow image or a numpy array, found {type(image).__name__}"
    )


def prepare(
    images: Sequence[Pixels], settings: PixelSettings
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Resize, normalise and pad at the bottom and the right.

    Args:
        images: at least one, each uint8 [H, W, 3].
        settings: what to do.

    Returns:
        `pixel_values` float32 [B, 3, H, W] and `pixel_mask` int64 [B, H, W], 1 on real pixels.
    """
    resized = [_resize(image, settings) for image in images]
    height, width = padded_size([image.shape[:2] for image in resized], settings.pad_size_divisor)
    pixel_values = np.zeros((len(images), 3, height, width), dtype=np.float32)
    pixel_mask = np.zeros((len(images), height, width), dtype=np.int64)
    # one subtraction and one division, as the image processor fuses the two steps
    mean = (np.array(settings.mean) / settings.scale).astype(np.float32)
    std = (np.array(settings.std) / settings.scale).astype(np.float32)
    for row, image in enumerate(resized):
        high, wide = image.shape[:2]
        pixel_values[row, :, :high, :wide] = ((image - mean) / std).transpose(2, 0, 1)
        pixel_mask[row, :high, :wide] = 1
    return pixel_values, pixel_mask


def _resize(image: Pixels, settings: PixelSettings) -> Pixels:
    if settings.resample is None:
        return image
    height, width = image.shape[:2]
    if settings.shortest_edge:
        shape = resized_shape(height, width, settings.shortest_edge, settings.longest_edge)
    else:
        assert settings.height is not None
        assert settings.width is not None
        shape = (settings.height, settings.width)
    if shape == (height, width):
        return image
    filter_ = Image.Resampling(settings.resample)
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), filter_))


def _three(values: Any) -> tuple[float, float, float]:
    """A number for each channel."""
    red, green, blue = values if isinstance(values, list | tuple) else [values] * 3
    return float(red), float(green), float(blue)
