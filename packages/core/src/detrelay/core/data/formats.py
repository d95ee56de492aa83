"""The supported image formats. Imports nothing, so that commands start at once."""

from __future__ import annotations

# Pillow's names, with the file suffixes.
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
# Pillow's own limit.
MAX_PIXELS = 178_956_970
