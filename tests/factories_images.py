"""Image files of every kind, generated on the fly."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from factories_data import noise_image

HEIGHT, WIDTH = 30, 40
QUARTER_TURN = 6  # EXIF: to be displayed turned 90 degrees clockwise
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageFile:
    """A file and its expected pixels.

    Attributes:
        content: the bytes of the file.
        pixels: uint8 [H, W, 3]; None where the format loses some, so that no way may differ.
        array: the same image as an array, where one can say what the file says.
    """

    content: bytes
    pixels: Pixels | None = None
    array: NDArray[Any] | None = None


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def color() -> Image.Image:
    return noise_image(WIDTH, HEIGHT)


def ramp(step: int = 257) -> NDArray[np.uint16]:
    """16-bit grey from black (left) up by `step`."""
    return np.tile(np.linspace(0, 255, WIDTH), (HEIGHT, 1)).astype(np.uint16) * step


def cut_out() -> Image.Image:
    """A red square and a half-transparent blue one on invisible black."""
    image = Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (10, 10, 20, 20))
    image.paste((0, 0, 255, 128), (25, 10, 35, 20))
    return image


def over_white(image: Image.Image) -> Pixels:
    """Alpha compositing by the textbook formula, rounded to the nearest value."""
    rgba = np.array(image.convert("RGBA")).astype(np.int64)
    alpha = rgba[..., 3:]
    blend = rgba[..., :3] * alpha + 255 * (255 - alpha)
    return ((2 * blend + 255) // 510).astype(np.uint8)


def grey(values: NDArray[Any]) -> Pixels:
    return np.repeat(values[..., None], 3, axis=-1).astype(np.uint8)


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[274] = QUARTER_TURN
    return tags


def png(depth: int, kind: int, values: NDArray[Any], transparent: bytes = b"") -> bytes:
    """A PNG of a kind that Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff_of_12_bits(values: NDArray[np.uint16]) -> bytes:
    """A grey TIFF with two values in three bytes, as cameras and scanners write it."""
    first, second = values.astype(np.uint16).reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    offset = struct.pack("<I", 8 + len(data))
    return b"II*\0" + offset + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def _palette() -> tuple[Image.Image, Image.Image]:
    plain = color().quantize(16)
    clear = plain.copy()
    clear.info["transparency"] = 3
    return plain, clear


def image_files() -> dict[str, ImageFile]:
    """Readable files, by kind."""
    return {**_color_files(), **_grey_files(), **_deep_files(), **_clear_files(), **_other_files()}


def _color_files() -> dict[str, ImageFile]:
    rgb = color()
    pixels = np.array(rgb)
    return {
        "rgb.png": ImageFile(saved(rgb, "PNG"), pixels, pixels),
        "rgb.bmp": ImageFile(saved(rgb, "BMP"), pixels, pixels),
        "rgb.ppm": ImageFile(saved(rgb, "PPM"), pixels, pixels),
        "rgb.tif": ImageFile(saved(rgb, "TIFF"), pixels, pixels),
        "rgb.webp": ImageFile(saved(rgb, "WEBP", lossless=True), pixels, pixels),
        "rgb.jp2": ImageFile(saved(rgb, "JPEG2000"), pixels, pixels),
        "rgb.jpg": ImageFile(saved(rgb, "JPEG")),
        "rgb.jfif": ImageFile(saved(rgb, "JPEG", progressive=True)),
        "rgb.avif": ImageFile(saved(rgb, "AVIF")),
        "cmyk.jpe": ImageFile(saved(rgb.convert("CMYK"), "JPEG")),
        "cmyk.tif": ImageFile(saved(rgb.convert("CMYK"), "TIFF"), pixels),
        "lab.tif": ImageFile(saved(rgb.convert("LAB"), "TIFF")),
    }


def _grey_files() -> dict[str, ImageFile]:
    light, deep = color().convert("L"), ramp()
    light_pixels, mask = grey(np.array(light)), light.point(lambda value: value > 128, "1")
    clear_bytes = struct.pack(">H", int(deep[0, 5]))
    see_through = np.where(deep == deep[0, 5], 255, deep >> 8)
    return {
        "grey.png": ImageFile(saved(light, "PNG"), light_pixels, np.array(light)),
        "grey.jpg": ImageFile(saved(light, "JPEG")),
        "grey.pgm": ImageFile(saved(light, "PPM"), light_pixels, np.array(light)),
        "bits.png": ImageFile(saved(mask, "PNG"), grey(255 * np.array(mask)), np.array(mask)),
        "bits.pbm": ImageFile(saved(mask, "PPM"), grey(255 * np.array(mask)), np.array(mask)),
        "grey16.png": ImageFile(saved(Image.fromarray(deep), "PNG"), grey(deep >> 8), deep),
        "grey16.tif": ImageFile(saved(Image.fromarray(deep), "TIFF"), grey(deep >> 8), deep),
        "grey16.pgm": ImageFile(saved(Image.fromarray(deep), "PPM"), grey(deep >> 8), deep),
        "grey16_clear.png": ImageFile(
            png(16, 0, deep.astype(">u2"), clear_bytes), grey(see_through)
        ),
        "12_in_16.png": ImageFile(
            saved(Image.fromarray(ramp(16)), "PNG"), grey(ramp(16) >> 8), ramp(16)
        ),
        "grey12.tif": ImageFile(tiff_of_12_bits(ramp(16)), grey(ramp(16) >> 4)),
    }


def _deep_files() -> dict[str, ImageFile]:
    rgb = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    rgba = np.concatenate([rgb, np.full_like(rgb[..., :1], 65535)], axis=-1)
    rgba[:5, :, 3] = 0
    flat = np.where(rgba[..., 3:] == 0, 255, rgb >> 8).astype(np.uint8)
    return {
        "rgb16.png": ImageFile(png(16, 2, rgb.astype(">u2")), (rgb >> 8).astype(np.uint8), rgb),
        "rgba16.png": ImageFile(png(16, 6, rgba.astype(">u2")), flat, rgba),
    }


def _clear_files() -> dict[str, ImageFile]:
    alpha, (plain, clear) = cut_out(), _palette()
    la, flat = alpha.convert("LA"), over_white(alpha)
    plain_pixels = np.array(plain.convert("RGB"))
    clear_pixels = np.where(np.array(plain)[..., None] == 3, 255, plain_pixels)
    return {
        "la.png": ImageFile(saved(la, "PNG"), over_white(la)),
        "la.tif": ImageFile(saved(la, "TIFF"), over_white(la)),
        "rgba.png": ImageFile(saved(alpha, "PNG"), flat, np.array(alpha)),
        "rgba.tif": ImageFile(saved(alpha, "TIFF"), flat, np.array(alpha)),
        "rgba.webp": ImageFile(saved(alpha, "WEBP", lossless=True, exact=True), flat),
        "palette.png": ImageFile(saved(plain, "PNG"), plain_pixels),
        "palette.gif": ImageFile(saved(plain, "GIF"), plain_pixels),
        "palette_clear.png": ImageFile(saved(clear, "PNG"), clear_pixels),
        "palette_clear.gif": ImageFile(saved(clear, "GIF"), clear_pixels),
    }


def _other_files() -> dict[str, ImageFile]:
    """Turned images, and files of two images, of which the first counts."""
    rgb, (plain, _) = color(), _palette()
    pixels, plain_pixels = np.array(rgb), np.array(plain.convert("RGB"))
    turned = np.ascontiguousarray(np.rot90(pixels, -1))
    two: dict[str, Any] = {
        "save_all": True,
        "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "green")],
    }
    return {
        "turned.png": ImageFile(saved(rgb, "PNG", exif=exif()), turned),
        "turned.jpg": ImageFile(saved(rgb, "JPEG", exif=exif())),
        "turned.tif": ImageFile(saved(rgb, "TIFF", exif=exif()), turned),
        "two.gif": ImageFile(saved(plain, "GIF", **two), plain_pixels),
        "two.tiff": ImageFile(saved(rgb, "TIFF", **two), pixels),
    }


def refused_files() -> dict[str, tuple[bytes, str]]:
    """Unreadable files, and words of the error."""
    rgb = color()
    floats = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    whole = saved(rgb, "PNG")
    deep = np.zeros((HEIGHT, WIDTH, 3), dtype=">u2")
    clear = struct.pack(">HHH", 1000, 2000, 3000)
    writer: Callable[..., bytes] = saved
    return {
        "float.tif": (writer(Image.fromarray(floats), "TIFF"), "mode 'F'"),
        "int32.tif": (writer(Image.fromarray(floats.astype(np.int32)), "TIFF"), "mode 'I'"),
        "rgb16_clear.png": (png(16, 2, deep, clear), "transparent colour"),
        "postscript.png": (writer(rgb, "EPS"), "not an image in a known format"),
        "icon.png": (writer(rgb, "ICO"), "not an image in a known format"),
        "half.png": (whole[: len(whole) // 2], "cannot decode"),
        "text.png": (b"no image", "not an image in a known format"),
        "empty.png": (b"", "not an image in a known format"),
    }
