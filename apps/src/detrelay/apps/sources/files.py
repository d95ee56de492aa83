"""Images by path: a file, a folder, or a glob pattern."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from detrelay.apps.sources.item import Request, Source, file_input
from detrelay.core.data.formats import SUFFIXES

_APPLE_DOUBLE = "._"  # companion files that macOS writes on other file systems


def open_files(request: Request) -> Source:
    """The images of a path, a folder or a pattern, sorted.

    Images that lie directly in the output folder are left out: drawings go there.

    Raises:
        ValueError: there is no image.
    """
    pattern, output = request.place, request.output
    path = Path(pattern)
    left_out: Counter[str] = Counter()
    if path.is_dir():
        paths = _images(path.iterdir(), left_out)
    elif path.exists():
        paths = [path]
    else:
        paths = _images(map(Path, glob.glob(pattern, recursive=True)), left_out)
    place = output.resolve()
    others = [item for item in paths if item.parent.resolve() != place]
    if paths and not others:
        raise ValueError(
            f"--output {output}: holds the images of --input {pattern}, and the drawings would "
            f"be written among them; name another folder"
        )
    left_out["images in the output folder"] += len(paths) - len(others)
    counted = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    if not others:
        raise ValueError(
            f"--input {pattern}: no image there (looked for {' '.join(SUFFIXES)}"
            f"{'; found ' + counted if counted else ''})"
        )
    return Source([file_input(item, item.name) for item in sorted(others)], counted)


def _images(paths: Iterable[Path], left_out: Counter[str]) -> list[Path]:
    """The paths with the suffix of an image; others are counted."""
    images = []
    for path in paths:
        suffix = path.suffix.lower()
        if path.name.startswith(_APPLE_DOUBLE):
            left_out[f"files named {_APPLE_DOUBLE}* (AppleDouble)"] += 1
        elif path.is_dir():  # whatever it is called
            left_out["folders"] += 1
        elif suffix in SUFFIXES:
            images.append(path)
        else:
            left_out[f"{suffix} files" if suffix else "files without a suffix"] += 1
    return images
