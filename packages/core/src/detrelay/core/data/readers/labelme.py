"""LabelMe: a json file next to each image, with shapes in pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.readers.table import (
    ALL,
    Table,
    finish,
    images_by,
    read_json,
    split_folders,
    to_number,
)
from detrelay.core.data.sample import shown, some
from detrelay.core.errors import DataError

_OUTLINES = ("rectangle", "polygon", "oriented_rectangle", "mask")


def recognises(place: Path) -> bool:
    """Whether a folder contains LabelMe's files."""
    return place.is_dir() and bool(_folders(place))


def read(place: Path, images: Path | None = None) -> dict[str, Annotations]:
    """The splits of a LabelMe folder: one, or folders named like splits.

    Args:
        place: the folder.
        images: folder of the images; None looks next to the json files and in `images`.

    Raises:
        DataError: a file cannot be read or used; the message names it.
    """
    return finish({split: _table(folder, images) for split, folder in _folders(place).items()})


def _folders(place: Path) -> dict[str, Path]:
    folders = {ALL: place} if _is_labelme(place) else split_folders(place)
    return {split: folder for split, folder in folders.items() if _is_labelme(folder)}


def _is_labelme(folder: Path) -> bool:
    first = next(iter(sorted(folder.glob("*.json"))), None)
    if first is None or not first.is_file():
        return False
    with first.open("rb") as file:
        start = file.read(1 << 16)
    return b'"shapes"' in start and b'"categories"' not in start


def _table(folder: Path, images: Path | None) -> Table:
    places = [Path(images)] if images is not None else [folder, folder / "images"]
    files = images_by("stem", places)
    table = Table(folder, folder if images is None else Path(images))
    texts = sorted(folder.glob("*.json"))
    missing = []
    for text in texts:
        content = read_json(text)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            raise DataError(f"{text} is no LabelMe file: expected an object with a list of shapes")
        named = Path(str(content.get("imagePath", "")).replace("\\", "/"))
        path = files.get(text.stem) or files.get(named.stem)
        if path is None:
            missing.append(named.name or text.stem)
            continue
        _add_file(table, text, content, path)
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(texts)} images are not beside their json files: "
            f"{some(missing)}; name the folder that holds the images"
        )
    bare = len(set(files) - {text.stem for text in texts})
    if bare and images is None:
        table.note("images have no json file and are left out", bare)
    return table


def _add_file(table: Table, text: Path, content: Mapping[str, Any], path: Path) -> None:
    size = None
    if content.get("imageHeight") is not None and content.get("imageWidth") is not None:
        size = (
            int(to_number(content["imageHeight"], f"{text} imageHeight")),
            int(to_number(content["imageWidth"], f"{text} imageWidth")),
        )
    image, *_ = table.image(path, size)
    for number, shape in enumerate(content["shapes"]):
        where = f"{text} shapes[{number}]"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            raise DataError(f"{where}: expected an object with a label, found {shown(shape)}")
        kind = shape.get("shape_type") or "polygon"  # old files have no other
        points = _points(shape.get("points"), where)
        if kind == "circle" and len(points) == 2:
            radius = math.dist(*points)
            (left, top), _ = points
            points = [(left - radius, top - radius), (left + radius, top + radius)]
        elif kind not in _OUTLINES or len(points) < 2:
            table.note(f"shapes of kind {shown(kind)} have no box and are left out")
            continue
        if kind != "rectangle":
            table.note(f"shapes of kind {shown(kind)} became their enclosing boxes")
        x, y = zip(*points, strict=True)
        table.box(image, shape["label"].strip(), (min(x), min(y)), (max(x), max(y)))


def _points(points: object, where: str) -> Sequence[tuple[float, float]]:
    if not isinstance(points, list) or not all(
        isinstance(point, list) and len(point) == 2 for point in points
    ):
        raise DataError(f"{where}: points must be pairs [x, y], found {shown(points)}")
    return [(to_number(x, where), to_number(y, where)) for x, y in points]
