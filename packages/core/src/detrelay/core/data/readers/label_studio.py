"""Label Studio: a json list of tasks, with shapes in percent of the image."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.formats import SUFFIXES
from detrelay.core.data.readers.cvat import turned
from detrelay.core.data.readers.table import (
    ALL,
    Table,
    finish,
    images_by,
    only_json,
    read_json_list,
    refuse_missing,
    start_of_json,
    to_number,
)
from detrelay.core.data.sample import shown
from detrelay.core.errors import DataError

_UPLOAD = re.compile(r"^[0-9a-f]{8}-")  # prefix of the name of an uploaded file


def recognises(place: Path) -> bool:
    """Whether a place is a json list, or a folder with one and no other json."""
    file = _file_in(place)
    start = b"" if file is None else start_of_json(file)
    return start.startswith(b"[") and b'"data"' in start


def _file_in(place: Path) -> Path | None:
    return only_json(place) if place.is_dir() else place


def read(place: Path, images: Path | None = None) -> dict[str, Annotations]:
    """The annotated tasks of an export.

    Args:
        place: the json file, or a folder with no other json.
        images: folder of the images; None looks in `images` next to the file and next to it.

    Raises:
        DataError: the file cannot be read or used.
    """
    file = _file_in(place)
    assert file is not None
    folders = [Path(images)] if images is not None else [file.parent / "images", file.parent]
    files = images_by("name", folders)
    table = Table(file, next((folder for folder in folders if folder.is_dir()), file.parent))
    missing: list[str] = []
    annotated = False
    for row, task in enumerate(read_json_list(file)):
        if not isinstance(task, dict):
            raise DataError(f"{file}: expected a list of tasks, as Label Studio exports json")
        if row == 0 and "score" in task:
            raise DataError(f"{file} is a list of detections (results), which holds no truth")
        annotated |= isinstance(task.get("annotations"), list)
        _add_task(table, task, f"{file} task {task.get('id', row)}", files, missing)
    if not annotated:
        raise DataError(f"{file}: no task has annotations; expected an export of Label Studio")
    refuse_missing(file, missing, folders)
    return finish({ALL: table})


def _add_task(
    table: Table, task: Mapping[str, Any], where: str, files: Mapping[str, Path], missing: list[str]
) -> None:
    given = task.get("annotations") or []
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise DataError(f"{where}: annotations must be a list of objects, found {shown(given)}")
    valid = [entry for entry in given if not entry.get("was_cancelled")]
    if len(valid) < len(given):
        table.note("cancelled annotations left out", len(given) - len(valid))
    if not valid:
        predicted = " (predictions are no truth)" if task.get("predictions") else ""
        table.note(f"tasks without an annotation left out{predicted}")
        return
    if len(valid) > 1:
        table.note("tasks with several annotations; the first of each is taken")
    results = valid[0].get("result")
    if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
        raise DataError(f"{where}: result must be a list of objects, found {shown(results)}")
    name = _image_name(task.get("data"), where)
    path = files.get(name) or files.get(_UPLOAD.sub("", name))
    if path is None:
        missing.append(name)
        return
    size = None
    for entry in results:
        if "original_width" in entry and "original_height" in entry:
            size = (
                int(to_number(entry["original_height"], f"{where} original_height")),
                int(to_number(entry["original_width"], f"{where} original_width")),
            )
    image, height, width = table.image(path, size)
    for entry in results:
        _add_shape(table, image, (width, height), entry, where)


def _image_name(data: object, where: str) -> str:
    """File name in a task's link to its image."""
    values = [value for value in data.values()] if isinstance(data, dict) else []
    for value in values:
        if isinstance(value, str):
            try:
                link = urlsplit(value.replace("\\", "/"))
            except ValueError:
                continue
            local = parse_qs(link.query).get("d", [link.path])[0]
            name = unquote(local).rpartition("/")[2]
            if Path(name).suffix.lower() in SUFFIXES:
                return name
    raise DataError(f"{where}: data names no image file, found {shown(data)}")


def _add_shape(
    table: Table, image: int, sides: tuple[int, int], entry: Mapping[str, Any], where: str
) -> None:
    kind = entry.get("type")
    value = entry.get("value")
    if not isinstance(value, dict):
        raise DataError(f"{where}: a result has no value, found {shown(value)}")
    if kind in ("rectanglelabels", "rectangle"):
        points = _rectangle(value, sides, where, table)
    elif kind in ("polygonlabels", "polygon"):
        points = _polygon(value, sides, where)
        table.note("polygons became their enclosing boxes")
    elif kind in ("ellipselabels", "ellipse"):
        x, y, rx, ry = (
            to_number(value.get(key), f"{where} {key}") for key in ("x", "y", "radiusX", "radiusY")
        )
        points = _in_pixels([(x - rx, y - ry), (x + rx, y + ry)], sides)
        table.note("ellipses became their enclosing boxes")
    else:
        table.note(f"results of type {shown(kind)} have no box and are left out")
        return
    labels = value.get(str(kind))
    if not isinstance(labels, list) or not labels or not all(isinstance(x, str) for x in labels):
        table.note("shapes without a label left out")
        return
    if len(labels) > 1:
        table.note("shapes with several labels; the first of each is taken")
    x_all, y_all = zip(*points, strict=True)
    table.box(image, labels[0], (min(x_all), min(y_all)), (max(x_all), max(y_all)))


def _in_pixels(
    points: Sequence[tuple[float, float]], sides: tuple[int, int]
) -> list[tuple[float, float]]:
    return [(x * sides[0] / 100, y * sides[1] / 100) for x, y in points]


def _rectangle(
    value: Mapping[str, Any], sides: tuple[int, int], where: str, table: Table
) -> list[tuple[float, float]]:
    x, y, width, height = (
        to_number(value.get(key), f"{where} {key}") for key in ("x", "y", "width", "height")
    )
    corners = _in_pixels([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], sides)
    turn = math.radians(to_number(value.get("rotation", 0), f"{where} rotation"))
    if not turn:
        return corners
    table.note("rotated boxes became their enclosing boxes")
    return turned(corners, corners[0], turn)


def _polygon(
    value: Mapping[str, Any], sides: tuple[int, int], where: str
) -> list[tuple[float, float]]:
    points = value.get("points")
    if (
        not isinstance(points, list)
        or not points
        or not all(isinstance(point, list) and len(point) == 2 for point in points)
    ):
        raise DataError(f"{where}: points of a polygon must be pairs [x, y], found {shown(points)}")
    return _in_pixels([(to_number(x, where), to_number(y, where)) for x, y in points], sides)
