"""Compare the annotation files of one place: other formats, and additional tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.checking import Defect
from detrelay.core.data.places import Found, open_place
from detrelay.core.errors import DataError

# Corners are equal within this, pixels: formats count from 0 or from 1, or round.
_SAME = 1.01


def compare_others(found: Found, images: Path | None = None) -> tuple[list[Defect], list[str]]:
    """Compare what was read from a place with its other annotation files, image by image.

    Args:
        found: what was read.
        images: folder of the images, as for `open_place`.

    Returns:
        A defect for each of the others that disagrees, and a sentence for each that cannot be read.
    """
    defects: list[Defect] = []
    unread: list[str] = []
    own = _by_file(found.splits)
    for place in _others(found):
        try:
            other = open_place(place, images)
        except DataError as error:
            unread.append(f"not compared: {error}")
            continue
        examples = [
            f"{name}: {line}"
            for name, theirs in _by_file(other.splits).items()
            if name in own and (line := _difference(own[name], theirs))
        ]
        if examples:
            what = f"images have other boxes in {place} than in the {found.format} files"
            defects.append(Defect(what, len(examples), examples))
    return defects, unread


def _others(found: Found) -> Iterator[str]:
    """The place by its other formats, and the tables in its folder."""
    yield from (f"{name}:{found.place}" for name in found.also)
    folder = Path(found.place)
    if folder.is_dir() and found.format != "csv" and "csv" not in found.also:
        yield from map(str, sorted(folder.glob("*.csv")))


def _by_file(splits: Mapping[str, Annotations]) -> dict[str, tuple[Annotations, NDArray[np.int64]]]:
    """The boxes of each image, by the last part of its name."""
    result = {}
    for part in splits.values():
        order = np.argsort(part.box_image, kind="stable")
        starts = np.searchsorted(part.box_image[order], np.arange(len(part) + 1))
        for row in range(len(part)):
            name = Path(part.images.name(row)).name
            result[name] = (part, order[starts[row] : starts[row + 1]])
    return result


def _difference(
    own: tuple[Annotations, NDArray[np.int64]], theirs: tuple[Annotations, NDArray[np.int64]]
) -> str | None:
    """The differences between two readings of an image, or None."""
    corners = []
    for part, rows in (own, theirs):
        low, size = part.boxes_xywh[rows, :2], part.boxes_xywh[rows, 2:]
        corners.append(np.concatenate([low, low + size], axis=1))
    near = (np.abs(corners[0][:, None] - corners[1][None]) <= _SAME).all(2)
    names = [
        np.array([part.categories[label].name for label in part.box_class[rows]], dtype=object)
        for part, rows in (own, theirs)
    ]
    same = near & (names[0][:, None] == names[1][None])
    renamed = int((near.any(1) & ~same.any(1)).sum())
    parts = [
        f"{int((~near.any(1)).sum())} boxes only here",
        f"{int((~near.any(0)).sum())} only there",
        f"{renamed} of another category",
    ]
    counts = [text for text in parts if not text.startswith("0 ")]
    return (
        f"{near.shape[0]} boxes here, {near.shape[1]} there; {', '.join(counts)}"
        if counts
        else None
    )
