"""Open a place with annotated images: recognise its format and read its splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.kept_ids import with_kept_category_ids, with_kept_ids
from detrelay.core.data.label_map import with_categories
from detrelay.core.data.readers import (
    coco_folders,
    createml,
    csv_rows,
    cvat,
    hub,
    label_studio,
    labelme,
    voc,
    yolo,
)
from detrelay.core.data.readers.table import TEST, TRAIN, VAL
from detrelay.core.errors import DataError, unknown_name


class Read(Protocol):
    """Reads the splits of a place."""

    def __call__(self, place: Path, images: Path | None = None) -> dict[str, Annotations]:
        """The splits by name."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format of annotations.

    Attributes:
        title: its name in messages.
        recognises: whether a place looks like this format.
        read: its reader.
        named: read only if asked for by name, since its files look like another format's.
    """

    title: str
    recognises: Callable[[Path], bool]
    read: Read
    named: bool = False


# In the order in which they are tried; the name before a colon selects one of them.
FORMATS: Mapping[str, Format] = {
    "coco": Format("COCO", coco_folders.recognises, coco_folders.read),
    "yolo": Format("YOLO", yolo.recognises, yolo.read),
    "cvat": Format("CVAT for images", cvat.recognises, cvat.read),
    "voc": Format("Pascal VOC", voc.recognises, voc.read),
    "voc_devkit": Format("Pascal VOC counted from 1", voc.recognises, voc.read_devkit, named=True),
    "hub": Format("Hugging Face datasets", hub.recognises, hub.read),
    "hub_xyxy": Format(
        "Hugging Face datasets with corners", hub.recognises, hub.read_corners, True
    ),
    "createml": Format("CreateML", createml.recognises, createml.read),
    "labelme": Format("LabelMe", labelme.recognises, labelme.read),
    "csv": Format("csv", csv_rows.recognises, csv_rows.read),
    "label_studio": Format("Label Studio", label_studio.recognises, label_studio.read),
}


@dataclass(frozen=True, slots=True)
class Found:
    """The content of a place.

    Attributes:
        place: as the user named it.
        format: key of `FORMATS`.
        splits: `train`, `val` and `test`, those that exist, else one of another name.
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


def open_place(place: str, images: Path | None = None, *, allow_outside: bool = False) -> Found:
    """Read all splits of a place.

    Args:
        place: a file or folder, prefixed with `FORMAT:` if it could be several; `hub:NAME` for a
            dataset on the Hub.
        images: folder of the images if they are elsewhere.
        allow_outside: let COCO's `file_name` point outside the image folder; other formats never
            do.

    Raises:
        DataError: nothing is there, the format is not recognised, or the files cannot be used.
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
        if not _recognised(name, path):
            raise DataError(f"{rest} does not look like {FORMATS[name].title}")
        return Found(rest, name, _read(name, path, images, allow_outside))
    _check_exists(path)
    names = [name for name, known in FORMATS.items() if not known.named and _recognised(name, path)]
    if not names:
        raise DataError(
            f"{place}: no annotations in a known format ({', '.join(FORMATS)}); name the file, or "
            f"the format, as in voc:{place}"
        )
    splits = _read(names[0], path, images, allow_outside)
    return Found(place, names[0], splits, tuple(names[1:]))


def open_stream(place: str, names: Sequence[str] = ()) -> hub.Stream:
    """The training split of a data set in the Hub's layout, to be read row by row.

    Args:
        place: a file or folder, or `hub:NAME` (`hub_xyxy:NAME` if boxes are corners).
        names: see `hub.stream`.

    Raises:
        DataError: it has another format, or cannot be read as a stream.
    """
    name, colon, rest = place.partition(":")
    if not colon or name not in ("hub", "hub_xyxy") or Path(place).exists():
        name, rest = "hub", place
        _check_exists(Path(place))
    path = Path(rest)
    if not path.exists():
        return hub.stream(rest, names, corners=name == "hub_xyxy")
    if not _recognised(name, path):
        raise DataError(
            f"{rest} does not look like {FORMATS[name].title}, the one format that can be "
            f"streamed; set data.stream=false"
        )
    found = hub.stream(path, names, corners=name == "hub_xyxy")
    return replace(found, categories=with_kept_category_ids(path, found.categories))


def _recognised(name: str, path: Path) -> bool:
    try:
        return FORMATS[name].recognises(path)
    except NotADirectoryError:  # a device, or a file where a folder is expected
        return False
    except OSError as error:
        raise DataError(f"cannot look into {path}: {error.strerror or error}") from error


def _read(
    name: str, path: Path, images: Path | None, allow_outside: bool
) -> dict[str, Annotations]:
    if name == "coco":
        return coco_folders.read(path, images, allow_outside=allow_outside)
    return with_kept_ids(path, FORMATS[name].read(path, images))


def _check_exists(path: Path) -> None:
    try:
        there = path.exists()
    except (OSError, ValueError):  # the name is too long or has a null character
        there = False
    if not there:
        raise DataError(
            f"no annotation file or folder {path}; a data set on the Hub is named by hub:{path}"
        )


def split_of(found: Found, split: str) -> Annotations | None:
    """A split of a place; if there is only one, that one whatever its name.

    For evaluation, `test` replaces a missing `val`.
    """
    if split in found.splits:
        return found.splits[split]
    if split == VAL and TEST in found.splits:
        return found.splits[TEST]
    if len(found.splits) == 1:
        return next(iter(found.splits.values()))
    return None


def train_and_val(
    train: tuple[str, Path | None],
    val: tuple[str | None, Path | None],
    *,
    share: float,
    seed: int,
    allow_outside: bool = False,
) -> tuple[Annotations, Annotations]:
    """Images to train on and to evaluate on, with the same categories.

    Args:
        train: place of the training images and their folder, if known.
        val: the same for evaluation; without a place, the held-out split of the training place or,
            if it has none, a share of its training images.
        share: that share of the training images.
        seed: selects these images.
        allow_outside: see `open_place`.

    Raises:
        DataError: a place cannot be used, or a category to evaluate on is not trained on.
    """
    found = open_place(*train, allow_outside=allow_outside)
    learned = _needed(found, TRAIN)
    if val[0] is not None:
        held_out = _needed(open_place(val[0], val[1], allow_outside=allow_outside), VAL)
    else:
        given = found.splits.get(VAL, found.splits.get(TEST))
        learned, held_out = (learned, given) if given is not None else cut(learned, share, seed)
    learned = replace(learned, notes=(*learned.notes, f"read from {found.summary()}"))
    return learned, with_categories(held_out, learned)


def evaluation_split(
    place: str, images: Path | None = None, *, allow_outside: bool = False
) -> Annotations:
    """The images of a place to evaluate on.

    Raises:
        DataError: the place cannot be used, or has several splits and none for that.
    """
    return _needed(open_place(place, images, allow_outside=allow_outside), VAL)


def _needed(found: Found, split: str) -> Annotations:
    part = split_of(found, split)
    if part is None:
        raise DataError(
            f"{found.place} has no split {split!r}, only {', '.join(found.splits)}; name the files "
            f"of each, as in --data train=... val=..."
        )
    return part


def cut(whole: Annotations, share: float, seed: int) -> tuple[Annotations, Annotations]:
    """Split a dataset without splits into training and held-out images.

    Args:
        whole: all images.
        share: of the images to hold out, at least one.
        seed: selects them.

    Raises:
        DataError: there is only one image.
    """
    if len(whole) < 2:
        raise DataError(f"{whole.source}: one image cannot be cut into training and evaluation")
    count = min(max(1, round(share * len(whole))), len(whole) - 1)
    held_out = np.zeros(len(whole), dtype=np.bool_)
    held_out[np.random.default_rng(seed).permutation(len(whole))[:count]] = True
    note = f"no split to evaluate on: {count} of {len(whole)} images are held out (seed {seed})"
    return whole.select(~held_out), replace(whole.select(held_out), notes=(*whole.notes, note))
