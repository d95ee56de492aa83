"""CVAT for images 1.1: one XML file with all images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.readers.table import (
    ALL,
    TEST,
    TRAIN,
    VAL,
    Table,
    finish,
    iterate_xml,
    refuse_missing,
    split_name,
    to_number,
)
from detrelay.core.data.sample import Category
from detrelay.core.errors import DataError

_DRAWN = ("box", "polygon", "polyline", "points", "ellipse", "mask", "cuboid", "tag", "skeleton")


def recognises(place: Path) -> bool:
    """Whether a place is CVAT's XML file, or a folder with `annotations.xml`."""
    file = place / "annotations.xml" if place.is_dir() else place
    if file.suffix.lower() != ".xml" or not file.is_file():
        return False
    with file.open("rb") as stream:
        return b"<annotations" in stream.read(4096).replace(b"\0", b"")


def read(place: Path, images: Path | None = None) -> dict[str, Annotations]:
    """The splits of a CVAT export, from the subsets of its images.

    Args:
        place: the XML file, or the folder with `annotations.xml`.
        images: folder that names are relative to; None looks next to the file and in `images`.

    Raises:
        DataError: the file cannot be read or used.
    """
    file = place / "annotations.xml" if place.is_dir() else place
    folders = [Path(images)] if images is not None else [file.parent / "images", file.parent]
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise DataError(f"no image folder {images}; name the folder that holds the images")
    tables: dict[str, Table] = {}
    missing = []
    names: list[str] = []
    for entry in _parts(file):
        if entry.tag == "meta":
            labels = [label.findtext("name") or "" for label in entry.iterfind(".//label")]
            names += [label.strip() for label in labels]
            continue
        split = split_name(entry.get("subset", "")) or ALL
        table = tables.setdefault(split, Table(file, folders[-1]))
        path = _find(folders, entry.get("name", ""), entry.get("subset", ""))
        if path is None:
            missing.append(entry.get("name", ""))
            continue
        _add(table, entry, path, f"{file} image {entry.get('name')}")
    refuse_missing(file, missing, folders)
    names = list(dict.fromkeys(name for name in names if name))
    used = {label for table in tables.values() for label in table.labels}
    numbered = [Category(number, name) for number, name in enumerate(names, start=1)]
    ordered = {s: tables[s] for s in (TRAIN, VAL, TEST, ALL) if s in tables}
    if not ordered:
        raise DataError(f"{file}: no images found; there is nothing to use")
    return finish(ordered, numbered if used <= set(names) and names else None)


def _parts(file: Path) -> Iterator[Element]:
    """The parts `meta` and `image` of an export, each of which is emptied afterwards."""
    root = None
    for event, element in iterate_xml(file):
        if root is None:
            root = element
            if root.tag != "annotations":
                raise DataError(f"{file}: expected CVAT's <annotations>, found <{root.tag}>")
        if element.tag == "track":
            raise DataError(
                f"{file} is an export for video (it has <track>); export it as CVAT for images"
            )
        if event == "end" and element.tag in ("meta", "image"):
            yield element
            element.clear()


def _find(folders: Sequence[Path], name: str, subset: str) -> Path | None:
    name = name.replace("\\", "/")
    for folder in folders:
        for path in (folder / name, folder / subset / name, folder / Path(name).name):
            if name and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                return path
    return None


def _add(table: Table, entry: Element, path: Path, where: str) -> None:
    size = None
    if entry.get("width") and entry.get("height"):
        size = (
            int(to_number(entry.get("height"), f"{where} height")),
            int(to_number(entry.get("width"), f"{where} width")),
        )
    image, *_ = table.image(path, size)
    for shape in entry:
        if shape.tag not in _DRAWN:
            continue
        points = _outline(shape, where, table)
        if not points:
            table.note(f"shapes of kind {shape.tag} have no box and are left out")
            continue
        label = (shape.get("label") or "").strip()
        if not label:
            raise DataError(f"{where}: a {shape.tag} has no label")
        x, y = zip(*points, strict=True)
        table.box(image, label, (min(x), min(y)), (max(x), max(y)))


def _outline(shape: Element, where: str, table: Table) -> list[tuple[float, float]]:
    """Points whose enclosing box is the shape's; none for a shape without one."""
    if shape.tag == "polygon":
        table.note("polygons became their enclosing boxes")
        pairs = [pair.split(",") for pair in (shape.get("points") or "").split(";") if pair]
        if not all(len(pair) == 2 for pair in pairs):
            raise DataError(f"{where}: points of a polygon must be pairs x,y")
        return [(to_number(x, where), to_number(y, where)) for x, y in pairs]
    if shape.tag == "ellipse":
        table.note("ellipses became their enclosing boxes")
        x, y, rx, ry = (to_number(shape.get(key), where) for key in ("cx", "cy", "rx", "ry"))
        return [(x - rx, y - ry), (x + rx, y + ry)]
    if shape.tag != "box":
        return []
    left, top, right, bottom = (
        to_number(shape.get(key), f"{where} {key}") for key in ("xtl", "ytl", "xbr", "ybr")
    )
    turn = math.radians(to_number(shape.get("rotation", "0"), f"{where} rotation"))
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    if not turn:
        return corners
    table.note("rotated boxes became their enclosing boxes")
    return turned(corners, ((left + right) / 2, (top + bottom) / 2), turn)


def turned(
    points: Sequence[tuple[float, float]], centre: tuple[float, float], turn: float
) -> list[tuple[float, float]]:
    """Points turned clockwise (y points down) about a centre; `turn` in radians."""
    cosine, sine = math.cos(turn), math.sin(turn)
    result = []
    for x, y in points:
        dx, dy = x - centre[0], y - centre[1]
        result.append((centre[0] + cosine * dx - sine * dy, centre[1] + sine * dx + cosine * dy))
    return result
