"""CreateML: a json list of images, with boxes by their centre in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.readers.table import (
    ALL,
    Table,
    finish,
    images_by,
    only_json,
    read_json_list,
    refuse_missing,
    split_folders,
    start_of_json,
    to_number,
)
from detrelay.core.data.sample import shown
from detrelay.core.errors import DataError


def recognises(place: Path) -> bool:
    """Whether a place is such a list, a folder with one and no other json, or has splits of it."""
    return bool(_files(place))


def read(place: Path, images: Path | None = None) -> dict[str, Annotations]:
    """The splits of a place: one, or folders named like splits.

    Args:
        place: the json file, or a folder.
        images: folder of the images; None looks next to each json file and in `images` next to it.

    Raises:
        DataError: a file cannot be read or used; the message names it.
    """
    return finish({split: _table(file, images) for split, file in _files(place).items()})


def _files(place: Path) -> dict[str, Path]:
    if not place.is_dir():
        return {ALL: place} if _is_createml(place) else {}
    folders = {ALL: place}
    if not any(place.glob("*.json")):
        folders = split_folders(place)
    found = {split: only_json(folder) for split, folder in folders.items()}
    return {split: file for split, file in found.items() if file and _is_createml(file)}


def _is_createml(file: Path) -> bool:
    start = start_of_json(file)
    return start.startswith(b"[") and b'"image"' in start and b'"coordinates"' in start


def _table(file: Path, images: Path | None) -> Table:
    folders = [Path(images)] if images is not None else [file.parent, file.parent / "images"]
    files = images_by("name", folders)
    table = Table(file, folders[0])
    missing: list[str] = []
    for number, entry in enumerate(read_json_list(file)):
        where = f"{file} [{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise DataError(f"{where}: expected an object with an image, found {shown(entry)}")
        name = entry["image"].replace("\\", "/").rpartition("/")[2]
        if name not in files:
            missing.append(name)
            continue
        _add_image(table, entry, files[name], where)
    refuse_missing(file, missing, folders)
    return table


def _add_image(table: Table, entry: Mapping[str, Any], path: Path, where: str) -> None:
    given = entry.get("annotations", [])
    if not isinstance(given, list):
        raise DataError(f"{where}: annotations must be a list, found {shown(given)}")
    image, *_ = table.image(path, None)
    for number, row in enumerate(given):
        place = f"{where} annotations[{number}]"
        if not isinstance(row, dict) or not isinstance(row.get("label"), str):
            raise DataError(f"{place}: expected an object with a label, found {shown(row)}")
        sides = row.get("coordinates")
        if not isinstance(sides, dict):
            raise DataError(f"{place}: coordinates must be an object, found {shown(sides)}")
        x, y, width, height = (
            to_number(sides.get(side), f"{place} {side}") for side in ("x", "y", "width", "height")
        )
        corners = ((x - width / 2, y - height / 2), (x + width / 2, y + height / 2))
        table.box(image, row["label"].strip(), *corners)
