"""Read images: the single path from files, Pillow images and arrays to pixels.

Training, evaluation, `predict`, the image processor and the pipeline all follow these rules, which
depend on what a file or an array declares and never on how bright it happens to be:

| source | becomes |
|---|---|
| 1 and 8 bits: grey, palette, RGB, CMYK, YCbCr, HSV, Lab | RGB by Pillow, profiles unread |
| 16 bits per channel (PNG, TIFF, PGM, uint16 arrays) | the upper 8 bits, as of 12 (TIFF) |
| transparency (alpha, a palette's or a single transparent colour) | laid over white |
| EXIF orientation | turned upright, unless annotations say otherwise (see `read_image`) |
| several images in a file | the first |
| 32-bit integers, floats; arrays other than uint8, uint16, bool | rejected: what is white? |

Formats are named explicitly, since Pillow has readers that start other programs. Only regular
files are opened: a pipe or a device would never end.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from detrelay.core.data.formats import FORMATS
from detrelay.core.data.formats import MAX_PIXELS as MAX_PIXELS
from detrelay.core.errors import DataError, one_line

if TYPE_CHECKING:  # exported detectors read images without torch
    from torch import Tensor

Pixels = NDArray[np.uint8]  # [H, W, 3], RGB
Source = str | os.PathLike[str] | bytes | io.BytesIO
_Result = TypeVar("_Result")
# Pillow's modules whose name differs from that of their format
_READERS = {"JPEG2000": "Jpeg2K", "WEBP": "WebP"}
_BITS_PER_SAMPLE = 258  # tag of a TIFF
_ORIENTATION = 274  # tag of EXIF
_END_OF_JPEG = b"\xff\xd9"
_DARK = 4096
_CHANNELS = (1, 3, 4)
_log = logging.getLogger(__name__)


class ImageError(DataError):
    """An image cannot be read; the message names it."""


def read_image(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Tensor:
    """Read an image file.

    Args:
        source: where the file is, or its content.
        size: (height, width) according to the annotations. An EXIF orientation is applied unless
            the image has this size only as stored.
        max_pixels: largest number of pixels to decode.
        name: name in messages of an image that is not a file.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        ImageError: the file cannot be read, has no known format, is damaged or too large, has
            another size, or its kind of pixels has no known white.
    """
    called, file = _openable(source, name)
    _lift_limit(max_pixels)

    def read() -> Tensor:
        with Image.open(file, formats=_readable()) as image:
            if _is_plain_jpeg(image, size, max_pixels):
                pixels = _pixels_of_jpeg(file)
                if pixels is not None:
                    return pixels
            return _to_tensor(_upright_pixels(called, image, size, max_pixels))

    return _guarded(called, read)


def read_pixels(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Pixels:
    """The same as uint8 [H, W, 3]."""
    called, file = _openable(source, name)
    _lift_limit(max_pixels)

    def read() -> Pixels:
        with Image.open(file, formats=_readable()) as image:
            return _upright_pixels(called, image, size, max_pixels)

    return _guarded(called, read)


def upright_size(source: Source, *, name: str | None = None) -> tuple[int, int]:
    """(height, width) of an image as displayed, pixels; only its header is read.

    Raises:
        ImageError: the file cannot be read or is not an image.
    """
    called, file = _openable(source, name)

    def read() -> tuple[int, int]:
        with Image.open(file, formats=_readable()) as image:
            width, height = image.size
            # from 5 on it is displayed on its side; Pillow reports a TIFF's size as displayed
            turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) >= 5
        return (width, height) if turned else (height, width)

    return _guarded(called, read)


def pixels_of_image(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The pixels of a Pillow image, by the rules for files; uint8 [3, H, W], RGB.

    Raises:
        ImageError: as in `read_image`.
    """
    return _to_tensor(image_to_pixels(image, max_pixels=max_pixels))


def image_to_pixels(image: Image.Image, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The same as uint8 [H, W, 3]."""
    name = str(getattr(image, "filename", "") or "the image")
    return _guarded(name, lambda: _upright_pixels(name, image, None, max_pixels))


def pixels_of_array(array: NDArray[Any] | Tensor, *, channels_last: bool | None = None) -> Tensor:
    """The pixels of an array: grey [H, W], or 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    Args:
        array: bool, uint8 or uint16, numpy's or torch's.
        channels_last: whether the last axis holds the channels, not the first. None infers it from
            the shape, and if both fit from the convention: last for numpy, first for torch.

    Returns:
        uint8 [3, H, W], RGB, on the array's device.

    Raises:
        ImageError: the array has another shape or type.
    """
    last = array.ndim == 2 or has_channels_last(array, channels_last)
    if isinstance(array, np.ndarray):
        return _to_tensor(array_to_pixels(array, channels_last=last))
    import torch

    if array.dtype == torch.uint8 and not last and array.shape[0] == 3:
        return array.contiguous()
    if array.dtype == torch.bfloat16:  # numpy lacks it
        array = array.float()
    return pixels_of_array(array.cpu().numpy(), channels_last=last).to(array.device)


def array_to_pixels(array: NDArray[Any], *, channels_last: bool | None = None) -> Pixels:
    """The same for a numpy array, as uint8 [H, W, 3]."""
    last = array.ndim == 2 or has_channels_last(array, channels_last)
    if array.dtype not in (np.bool_, np.uint8, np.uint16):
        raise ImageError(
            f"an image array must hold uint8, uint16 or bool, found {array.dtype}: it does not say "
            f"which value is white"
        )
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        array = _upper_byte(array, 8)
    if array.ndim == 3:
        array = array if last else np.moveaxis(array, 0, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    if 0 in array.shape:
        raise ImageError(f"an image array must hold pixels, found shape {list(array.shape)}")
    return np.array(_flat(Image.fromarray(np.ascontiguousarray(array))))


def has_channels_last(array: NDArray[Any] | Tensor, channels_last: bool | None) -> bool:
    """Whether the last axis of [H, W, C] or [C, H, W] holds the channels; see `pixels_of_array`."""
    shape = tuple(array.shape)
    if len(shape) == 3 and channels_last is None:
        first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
        channels_last = last and not (first and not isinstance(array, np.ndarray))
    if len(shape) != 3 or shape[2 if channels_last else 0] not in _CHANNELS:
        raise ImageError(
            f"an image array must be [height, width], or have an axis of 1, 3 or 4 channels "
            f"(grey, RGB, RGBA), found shape {list(shape)}"
        )
    return bool(channels_last)


def _openable(source: Source, name: str | None) -> tuple[str, Path | io.BytesIO]:
    """The name of an image in messages, and what Pillow may open."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    if isinstance(source, io.BytesIO):
        return name or "the image", source
    _check_regular(os.fspath(source))
    return os.fspath(source), Path(source)


def _check_regular(name: str) -> None:
    """Reject what can be opened without being a file."""
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise ImageError(f"cannot read image {name}: {_reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise ImageError(f"cannot read image {name}: it is a folder")
    if not stat.S_ISREG(mode):
        raise ImageError(f"cannot read image {name}: it is a pipe, socket or device, not a file")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)


def _guarded(name: str, read: Callable[[], _Result]) -> _Result:
    """The result of `read`, or one error that names the image."""
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of its own limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return read()
    except DataError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not an image in a known format ({', '.join(FORMATS)}), or it is damaged"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is too large: {one_line(error)} {_ADVICE}") from None
    except MemoryError:
        raise ImageError(f"image {name} does not fit into memory") from None
    except Exception as error:  # errors of Pillow's readers have no common base
        raise ImageError(f"cannot decode image {name}: {_reason(error)}") from error


_ADVICE = "A small file can claim any size; if this one is to be trusted, set max_pixels higher"


@cache
def _readable() -> tuple[str, ...]:
    """The formats that this Pillow can read; its other readers are not even imported."""
    for name in FORMATS:
        with suppress(ImportError):  # older versions lack AVIF
            importlib.import_module(f"PIL.{_READERS.get(name, name.capitalize())}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _lift_limit(max_pixels: int) -> None:
    """Let Pillow open what is allowed: it rejects twice its limit, which is process-wide."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and 2 * limit < max_pixels:
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)


def _upright_pixels(
    name: str, image: Image.Image, size: tuple[int, int] | None, max_pixels: int
) -> Pixels:
    """Pixels of an opened image, turned upright unless only the stored image has `size`."""
    width, height = stored = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"image {name} is too large: {width} x {height} pixels, more than the limit of "
            f"{max_pixels} (max_pixels). {_ADVICE}"
        )
    bits = _bits_per_sample(image)
    transparency = image.info.get("transparency")
    upright = ImageOps.exif_transpose(image)
    chosen = upright
    if size is not None and upright.size != (size[1], size[0]):
        if stored != (size[1], size[0]):
            turned = f" ({width} x {height} as stored)" if stored != upright.size else ""
            raise ImageError(
                f"image {name} is {upright.size[0]} x {upright.size[1]} pixels{turned}, but the "
                f"annotations say {size[1]} x {size[0]} (width x height): its boxes would not fit"
            )
        chosen = image
    # Pillow scales a PGM's values to 16 bits, though it calls them 32-bit integers
    if chosen.mode.startswith("I;16") or (chosen.mode == "I" and image.format == "PPM"):
        chosen = _deep_grey(name, chosen, bits, transparency)
    return np.array(_flat(chosen))


def _is_plain_jpeg(image: Image.Image, size: tuple[int, int] | None, max_pixels: int) -> bool:
    """Whether the pixels of an opened image are those of its JPEG data as they stand."""
    width, height = image.size
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and width * height <= max_pixels
        and size in (None, (height, width))
        and image.getexif().get(_ORIENTATION, 1) == 1
    )


def _pixels_of_jpeg(file: Path | io.BytesIO) -> Tensor | None:
    """What Pillow gives, in less than half of its time; None where Pillow must judge the file.

    torchvision decodes by the same library with the same settings, but fills up what a cut file
    lacks instead of rejecting it, so the end must be there.
    """
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    content = file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes()
    if not content.endswith(_END_OF_JPEG):
        return None
    try:
        pixels: Tensor = decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB
        )
    except RuntimeError:
        return None
    return pixels


def _bits_per_sample(image: Image.Image) -> int:
    """Bits that a 16-bit image uses: a TIFF may declare 12."""
    tags = getattr(image, "tag_v2", None) or {}
    return int(tags.get(_BITS_PER_SAMPLE, (16,))[0])


def _deep_grey(name: str, image: Image.Image, bits: int, transparency: Any) -> Image.Image:
    """Convert a 16-bit image to 8 bits; Pillow would clip values at 255."""
    values = np.asarray(image)
    if bits == 16 and 255 < values.max(initial=0) < _DARK:
        _warn_once_of_dark_image(name)
    grey = Image.fromarray(_upper_byte(values, bits - 8))
    if isinstance(transparency, int):
        clear = np.where(values == transparency, 0, 255).astype(np.uint8)
        return Image.merge("LA", (grey, Image.fromarray(clear)))
    return grey


@cache
def _dark_images_reported() -> list[str]:
    return []


def _warn_once_of_dark_image(name: str) -> None:
    if not _dark_images_reported():
        _dark_images_reported().append(name)
        _log.warning(
            "%s: no value of this 16-bit image is above 4095 of 65535, so it comes out nearly "
            "black; if such images hold 12 bits, multiply them by 16 (shown once)",
            name,
        )


def _upper_byte(values: NDArray[Any], shift: int) -> NDArray[np.uint8]:
    return (values >> shift).astype(np.uint8)


def _flat(image: Image.Image) -> Image.Image:
    """An image as RGB, composited over white."""
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are in mode {image.mode!r}, which does not say which value is white; "
            f"expected 8- or 16-bit colour"
        )
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:
        raise ValueError("its transparent colour has 16 bits per channel, its pixels only 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_tensor(pixels: Pixels) -> Tensor:
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
