"""The formats of images that are read. Imports nothing, so that command lines answer at once."""

from __future__ import annotations

# By Pillow's names, with the suffixes of their files.
FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2k", ".jp2"),
    "PNG": (".png",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
SUFFIXES = tuple(sorted(suffix for group in FORMATS.values() for suffix in group))
# Where Pillow itself refuses to go on.
MAX_PIXELS = 178_956_970
