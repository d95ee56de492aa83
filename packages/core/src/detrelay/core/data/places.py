"""A place with annotated images, in whatever format: which one it is, and its splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.readers import (
    coco_folders,
    csv_rows,
    cvat,
    hub,
    label_studio,
    labelme,
    voc,
    yolo,
)
from detrelay.core.data.readers.table import TEST, VAL
from detrelay.core.errors import DataError, unknown_name


class Read(Protocol):
    """Reads the splits of a place."""

    def __call__(self, place: Path, images: Path | None = None) -> dict[str, Annotations]:
        """The splits by name."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of annotations.

    Attributes:
        title: what it is called in messages.
        recognises: whether a place looks like it; None for one that must be named.
        read: its reader.
    """

    title: str
    recognises: Callable[[Path], bool] | None
    read: Read


# In the order in which a place is tried; the name before a colon asks for one of them.
FORMATS: Mapping[str, Format] = {
    "coco": Format("COCO", coco_folders.recognises, coco_folders.read),
    "yolo": Format("YOLO", yolo.recognises, yolo.read),
    "cvat": Format("CVAT for images", cvat.recognises, cvat.read),
    "voc": Format("Pascal VOC", voc.recognises, voc.read),
    "voc_devkit": Format("Pascal VOC counted from 1", None, voc.read_devkit),
    "hub": Format("Hugging Face datasets", hub.recognises, hub.read),
    "hub_xyxy": Format("Hugging Face datasets with corners", None, hub.read_corners),
    "labelme": Format("LabelMe", labelme.recognises, labelme.read),
    "csv": Format("csv", csv_rows.recognises, csv_rows.read),
    "label_studio": Format("Label Studio", label_studio.recognises, label_studio.read),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a place holds.

    Attributes:
        place: as it was named.
        format: key of `FORMATS`.
        splits: `train`, `val` and `test` as far as there are any, else one of another name.
        also: other formats that the place looks like.
    """

    place: str
    format: str
    splits: Mapping[str, Annotations]
    also: tuple[str, ...] = ()

    def summary(self) -> str:
        """Format, images, boxes, categories and splits in one line."""
        found = self.splits.values()
        splits = ", ".join(f"{name} {len(part)}" for name, part in self.splits.items())
        line = (
            f"{self.place}: {FORMATS[self.format].title}, "
            f"{sum(map(len, found))} images ({splits}), "
            f"{sum(len(part.box_ids) for part in found)} boxes, "
            f"{len(next(iter(found)).categories)} categories"
        )
        if self.also:
            other = self.also[0]
            line += f"; it looks like {FORMATS[other].title} too, read by {other}:{self.place}"
        return line


def open_place(place: str, images: Path | None = None) -> Found:
    """Read all splits of a place.

    Args:
        place: a file or folder, with `FORMAT:` before it where it could be several; `hub:NAME` for
            a data set on the Hub.
        images: folder of the images where they lie elsewhere.

    Raises:
        DataError: there is nothing, the format is not recognised, or the files cannot be used.
    """
    name, colon, rest = place.partition(":")
    path = Path(place)
    if colon and not path.exists() and (name in FORMATS or len(name) > 1):  # C: is a drive
        if name not in FORMATS:
            raise DataError(f"{place}: {unknown_name('format', name, FORMATS)}")
        path = Path(rest)
        if name.startswith("hub") and not path.exists():
            reader = hub.read if name == "hub" else hub.read_corners
            return Found(rest, name, reader(rest))
        _check_exists(path)
        return Found(rest, name, FORMATS[name].read(path, images))
    _check_exists(path)
    try:
        names = [
            name
            for name, known in FORMATS.items()
            if known.recognises is not None and known.recognises(path)
        ]
    except OSError as error:
        raise DataError(f"cannot look into {place}: {error.strerror or error}") from error
    if not names:
        raise DataError(
            f"{place}: no annotations in a known format ({', '.join(FORMATS)}); name the file, or "
            f"the format, as in voc:{place}"
        )
    return Found(place, names[0], FORMATS[names[0]].read(path, images), tuple(names[1:]))


def _check_exists(path: Path) -> None:
    try:
        there = path.exists()
    except (OSError, ValueError):  # too long a name, a null character
        there = False
    if not there:
        raise DataError(
            f"no annotation file or folder {path}; a data set on the Hub is named by hub:{path}"
        )


def split_of(found: Found, split: str) -> Annotations | None:
    """A split of a place; the only one whatever its name.

    For images to evaluate on, `test` stands in where there is no `val`.
    """
    if split in found.splits:
        return found.splits[split]
    if split == VAL and TEST in found.splits:
        return found.splits[TEST]
    if len(found.splits) == 1:
        return next(iter(found.splits.values()))
    return None


def cut(whole: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Training and held-out images of a set without splits.

    Args:
        whole: all images.
        share: of the images that are held out, at least one.
        seed: which ones.

    Raises:
        DataError: there is but one image.
    """
    if len(whole) < 2:
        raise DataError(f"{whole.source}: one image cannot be cut into training and evaluation")
    count = min(max(1, round(share * len(whole))), len(whole) - 1)
    held_out = np.zeros(len(whole), dtype=np.bool_)
    held_out[np.random.default_rng(seed).permutation(len(whole))[:count]] = True
    note = f"no split to evaluate on: {count} of {len(whole)} images are held out (seed {seed})"
    return whole.select(~held_out), replace(whole.select(held_out), notes=(*whole.notes, note))
