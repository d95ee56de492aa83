"""Ids that a format cannot store, in a separate file next to it.

YOLO and VOC have neither image ids nor box ids, and VOC no category ids. Converting there and back
keeps them in a file that other programs ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.sample import Category
from detrelay.core.errors import DataError, one_line

FILE = "detrelay_ids.json"


class _Split(msgspec.Struct):
    images: dict[str, int]
    boxes: dict[str, list[int]]
    areas: dict[str, list[float]]


class _Ids(msgspec.Struct):
    categories: list[tuple[int, str]]
    splits: dict[str, _Split]


def write_ids(folder: Path, splits: Mapping[str, tuple[Annotations, list[str]]]) -> None:
    """Write the ids of converted splits.

    Args:
        folder: the root of the converted data.
        splits: what was written, with the name of each image there.
    """
    content = _Ids([], {})
    for split, (part, names) in splits.items():
        content.categories = [(category.id, category.name) for category in part.categories]
        boxes: dict[str, list[int]] = {name: [] for name in names}
        areas: dict[str, list[float]] = {name: [] for name in names}
        for image, number, area in zip(
            part.box_image.tolist(), part.box_ids.tolist(), part.areas.tolist(), strict=True
        ):
            boxes[names[image]].append(number)
            areas[names[image]].append(area)
        images = dict(zip(names, part.image_ids.tolist(), strict=True))
        content.splits[split] = _Split(images, boxes, areas)
    (folder / FILE).write_bytes(msgspec.json.encode(content))


def with_kept_ids(place: Path, splits: Mapping[str, Annotations]) -> dict[str, Annotations]:
    """The splits with the ids from the file next to them, if there is one and it matches.

    Raises:
        DataError: the file cannot be read.
    """
    kept = _read(place)
    if kept is None:
        return dict(splits)
    return {split: _applied(part, kept, split) for split, part in splits.items()}


def with_kept_category_ids(place: Path, categories: tuple[Category, ...]) -> tuple[Category, ...]:
    """The categories with the ids from that file, if it names the same in the same order.

    Raises:
        DataError: the file cannot be read.
    """
    kept = _read(place)
    if kept is None:
        return categories
    found = tuple(sorted((Category(*entry) for entry in kept.categories), key=lambda c: c.id))
    same = [category.name for category in found] == [category.name for category in categories]
    return found if same else categories


def _read(place: Path) -> _Ids | None:
    file = (place if place.is_dir() else place.parent) / FILE
    if not file.is_file():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Ids)
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the ids in {file}: {one_line(error)}") from error


def _applied(part: Annotations, kept: _Ids, split: str) -> Annotations:
    names = [Path(part.images.name(row)).name for row in range(len(part))]
    ids = kept.splits.get(split, _Split({}, {}, {}))
    counts = np.bincount(part.box_image, minlength=len(part)).tolist()
    numbers = {name: number for number, name in kept.categories}
    used = {part.categories[row].name for row in np.unique(part.box_class)}
    fits = used <= numbers.keys() and all(
        name in ids.images and len(ids.boxes.get(name, ())) == len(ids.areas.get(name, ())) == count
        for name, count in zip(names, counts, strict=True)
    )
    if not fits:
        note = f"{FILE} does not fit these files, which were changed: ids are renumbered"
        return replace(part, notes=(*part.notes, note))
    categories = tuple(sorted((Category(*entry) for entry in kept.categories), key=lambda c: c.id))
    row_of = {category.name: row for row, category in enumerate(categories)}
    place = np.array([row_of.get(category.name, -1) for category in part.categories])
    order = np.argsort(part.box_image, kind="stable")
    box_ids, areas = np.empty_like(part.box_ids), np.empty_like(part.areas)
    box_ids[order] = [number for name in names for number in ids.boxes[name]]
    areas[order] = [area for name in names for area in ids.areas[name]]
    return replace(
        part,
        categories=categories,
        box_class=place[part.box_class],
        image_ids=np.array([ids.images[name] for name in names], dtype=np.int64),
        box_ids=box_ids,
        areas=areas,
        own_ids=True,
    )
