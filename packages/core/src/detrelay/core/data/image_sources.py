"""Pixels of an image in any form that a user may have."""

from __future__ import annotations

import base64
import binascii
import os
import urllib.request
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detrelay.core.data.addresses import is_address, request_of, without_password
from detrelay.core.data.decode import (
    MAX_PIXELS,
    ImageError,
    has_channels_last,
    pixels_of_array,
    pixels_of_image,
    read_image,
)
from detrelay.core.errors import one_line

_DOWNLOAD_SECONDS = 60
_LARGEST_DOWNLOAD = 2**30
# of a base64 image: a path could be valid base64 too
_MIN_BASE64 = 64


def pixels_of_any(
    images: Any,
    *,
    data_format: str | None = None,
    allow_floats: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """The pixels of an image, or of lists of images.

    Args:
        images: a Pillow image, an array or a tensor (four axes: several images), a path, an
            http(s) address, a base64 text (`data:image/...` or bare), or lists of these.
        data_format: "channels_first" or "channels_last" for arrays and tensors; None infers it as
            in `pixels_of_array`.
        allow_floats: accept floats in arrays as they are; otherwise they are rejected.
        max_pixels: largest number of pixels to decode.

    Returns:
        A tensor [3, H, W] for each image, uint8 unless it holds floats, in lists as they came.

    Raises:
        ImageError: an image cannot be read.
        TypeError: something is not an image.
    """
    if isinstance(images, list | tuple) or getattr(images, "ndim", None) == 4:
        return [
            pixels_of_any(
                item, data_format=data_format, allow_floats=allow_floats, max_pixels=max_pixels
            )
            for item in images
        ]
    if isinstance(images, str | os.PathLike):
        return read_image(_file_or_content(images), max_pixels=max_pixels)
    if isinstance(images, Image.Image):
        return pixels_of_image(images, max_pixels=max_pixels)
    if not isinstance(images, np.ndarray | Tensor):
        raise TypeError(
            f"an image must be a Pillow image, a numpy array, a torch tensor, a path, an address "
            f"or a base64 text, found {type(images).__name__}"
        )
    last = None if data_format is None else str(data_format).endswith("last")
    if allow_floats and torch.as_tensor(images).is_floating_point():
        return _floats(images, last)
    return pixels_of_array(images, channels_last=last)


def _floats(array: NDArray[Any] | Tensor, channels_last: bool | None) -> Tensor:
    """An array of floats as [3, H, W], grey repeated."""
    last = array.ndim == 2 or has_channels_last(array, channels_last)
    values = torch.as_tensor(array)
    if values.ndim == 2:
        values = values[..., None]
    values = values.permute(2, 0, 1) if last else values
    if len(values) == 4:
        raise ImageError("an image of floats must have 1 or 3 channels, found 4")
    return values.expand(3, -1, -1).contiguous()


def _file_or_content(source: str | os.PathLike[str]) -> str | os.PathLike[str] | bytes:
    """A path as it is, or the content of an address or a base64 text."""
    if not isinstance(source, str) or os.path.exists(source):
        return source
    if is_address(source):
        return _download(source)
    text = source.partition(",")[2] if source.startswith("data:image/") else source
    if len(text) < _MIN_BASE64:
        return source
    try:
        return base64.b64decode("".join(text.split()), validate=True) or source
    except (binascii.Error, ValueError):
        return source  # which is then reported as missing


def _download(address: str) -> bytes:
    shown = without_password(address)
    try:
        with urllib.request.urlopen(request_of(address), timeout=_DOWNLOAD_SECONDS) as answer:
            content: bytes = answer.read(_LARGEST_DOWNLOAD + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot fetch image {shown}: {one_line(error)}") from None
    if len(content) > _LARGEST_DOWNLOAD:
        raise ImageError(f"image {shown} is larger than {_LARGEST_DOWNLOAD} bytes")
    return content
