"""COCO detection json.

msgspec reads a file into typed rows, in a third of the time and memory of json's dictionaries. What
msgspec rejects is read again by json and checked entry by entry: for a message that names the
entry, or because only unneeded numbers are odd (json accepts NaN, msgspec does not).
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from detrelay.core.data.annotations import Annotations, Floats, Ints, alike_names, doubtful_boxes
from detrelay.core.data.image_paths import image_folders
from detrelay.core.data.images import ImageFiles
from detrelay.core.data.sample import Category, shown, some
from detrelay.core.errors import DataError, one_line
from detrelay.core.plain_file import refuse_endless

_IMAGE_KEYS = ("id", "file_name")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox")
_CATEGORY_KEYS = ("id", "name")
# Beyond any image, and small enough that float64 sums of two such numbers stay exact to 1e-6.
_LARGEST_COORDINATE = 1e9
_LARGEST_AREA = _LARGEST_COORDINATE**2
_CHUNK = 10_000

_Whole = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Image(msgspec.Struct, gc=False):
    id: _Whole
    file_name: str | None = None
    width: _Whole | None = None
    height: _Whole | None = None


class _Object(msgspec.Struct, gc=False):
    id: _Whole
    image_id: _Whole
    category_id: _Whole
    bbox: tuple[float, float, float, float]
    area: float | msgspec.UnsetType = msgspec.UNSET
    iscrowd: int | bool = 0


class _Class(msgspec.Struct):
    id: _Whole
    name: str
    supercategory: Any = None


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Class]
    # typed in chunks: all at once they take three times the size of the file
    annotations: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class _CheckedFile(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Object]
    categories: list[_Class]


@dataclass(frozen=True, slots=True)
class _Columns:
    """The annotations of a file, not yet checked; NaN where the area is missing."""

    ids: Ints
    image_ids: Ints
    category_ids: Ints
    boxes: Floats
    areas: Floats
    crowd: Ints


def read(
    path: Path,
    images: Path | None = None,
    *,
    with_files: bool = True,
    allow_outside: bool = False,
    annotated: bool = True,
) -> Annotations:
    """The annotations of a COCO detection json.

    Args:
        path: the json file.
        images: folder that `file_name` is relative to; None looks near the json file.
        with_files: images must have a `file_name` and a size too, as loading them needs.
        allow_outside: also accept a `file_name` that points outside the image folder.
        annotated: False also accepts a file without the key `annotations`, such as a list of test
            images.

    Raises:
        DataError: the file cannot be read, or its lists and ids are inconsistent.
    """
    listed, classes, columns = _parse(path, with_files, annotated)
    if not listed or not classes:
        empty = "categories" if listed else "images"
        raise DataError(f"{path} lists no {empty}: there is nothing to use")
    notes: list[str] = []
    classes = _checked_classes(path, classes, set(np.unique(columns.category_ids).tolist()), notes)
    notes += alike_names(entry.name for entry in classes)
    image_ids = np.array([entry.id for entry in listed], dtype=np.int64)
    _check_ids(path, "images", image_ids)
    _check_ids(path, "annotations", columns.ids)
    _check_numbers(path, columns)
    class_ids = np.array([entry.id for entry in classes], dtype=np.int64)
    box_image = _positions(path, "image_id", columns, columns.image_ids, image_ids)
    box_class = _positions(path, "category_id", columns, columns.category_ids, class_ids)
    names = [entry.file_name or "" for entry in listed]
    folders = image_folders(path, images) if with_files else [path.parent]
    files = ImageFiles(folders, names, str(path), allow_outside=allow_outside or not with_files)
    sizes = _sizes(path, listed, files if with_files else None, notes)
    if with_files and (doubt := doubtful_boxes(columns.boxes, sizes[box_image][:, ::-1])):
        notes.append(doubt)
    return Annotations(
        source=str(path),
        categories=tuple(Category(entry.id, entry.name) for entry in classes),
        images=files,
        image_ids=image_ids,
        sizes=sizes,
        boxes_xywh=columns.boxes,
        box_image=box_image,
        box_class=box_class,
        box_ids=columns.ids,
        areas=_areas(columns),
        crowd=columns.crowd.astype(np.bool_),
        notes=tuple(notes),
    )


def _parse(
    path: Path, with_files: bool, annotated: bool
) -> tuple[list[_Image], list[_Class], _Columns]:
    try:
        refuse_endless(path)
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no annotation file {path}; expected a COCO detection json") from None
    except OSError as error:
        raise DataError(f"cannot read {path} as json: {one_line(error)}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        content = msgspec.json.decode(data, type=_File)
        rows = content.annotations
        nameless = with_files and any(entry.file_name is None for entry in content.images)
        if nameless or (annotated and isinstance(rows, msgspec.UnsetType)):
            return _parse_carefully(path, data, with_files, annotated)
        rows = [] if isinstance(rows, msgspec.UnsetType) else rows
        return content.images, content.categories, _columns(_typed(rows))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _parse_carefully(path, data, with_files, annotated)


def _typed(entries: Sequence[msgspec.Raw]) -> Iterator[list[_Object]]:
    decoder = msgspec.json.Decoder(list[_Object])
    for start in range(0, len(entries), _CHUNK):
        yield decoder.decode(b"[" + b",".join(entries[start : start + _CHUNK]) + b"]")


def _columns(chunks: Iterable[list[_Object]]) -> _Columns:
    whole, real = array("q"), array("d")
    for chunk in chunks:
        for entry in chunk:
            whole.extend((entry.id, entry.image_id, entry.category_id, entry.iscrowd))
            real.extend(entry.bbox)
            real.append(np.nan if entry.area is msgspec.UNSET else entry.area)
    ids, image_ids, category_ids, crowd = np.array(whole).reshape(-1, 4).T.copy()
    reals = np.array(real).reshape(-1, 5)
    return _Columns(ids, image_ids, category_ids, reals[:, :4].copy(), reals[:, 4].copy(), crowd)


def _parse_carefully(
    path: Path, data: bytes, with_files: bool, annotated: bool
) -> tuple[list[_Image], list[_Class], _Columns]:
    """Reject anything but well-formed lists, with a message that names the entry."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise DataError(f"cannot read {path} as json: it is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"cannot read {path} as json: {one_line(error)}") from error
    if not isinstance(content, dict):
        rows = isinstance(content, list) and content and isinstance(content[0], dict)
        found = (
            "a list of detections (results), which holds no truth"
            if rows and "score" in content[0]
            else f"a {type(content).__name__}"
        )
        raise DataError(
            f"{path} is not a COCO detection json: expected an object with the keys images, "
            f"annotations and categories, found {found}"
        )
    if not annotated:
        content.setdefault("annotations", [])
    image_keys = _IMAGE_KEYS if with_files else ("id",)
    keys = {"images": image_keys, "annotations": _ANNOTATION_KEYS, "categories": _CATEGORY_KEYS}
    for part, required in keys.items():
        if not isinstance(content.get(part), list):
            raise DataError(
                f"{path} is not a COCO detection json: key {part!r} must hold a list, "
                + (f"found {type(content[part]).__name__}" if part in content else "it is missing")
            )
        _check_entries(path, part, content[part], required)
    for entry in content["annotations"]:
        _check_entry(path, entry)
    try:
        typed = msgspec.convert({part: content[part] for part in keys}, _CheckedFile)
        return typed.images, typed.categories, _columns([typed.annotations])
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} is not a COCO detection json: {one_line(error)}") from error


def _check_entries(path: Path, part: str, entries: Iterable[Any], required: Sequence[str]) -> None:
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: {part}[{row}] must be an object, found {type(entry).__name__}"
            )
        for key in required:
            if key not in entry:
                raise DataError(
                    f"{path} is not a COCO detection json: {part}[{row}] has no {key!r}"
                )
            wants_text = key in ("file_name", "name")
            if key != "bbox" and not (
                isinstance(entry[key], str) if wants_text else _is_integer(entry[key])
            ):
                raise DataError(
                    f"{path}: {key!r} of {part}[{row}] must be "
                    f"{'text' if wants_text else 'a whole number'}, found {shown(entry[key])}"
                )


def _check_entry(path: Path, entry: Mapping[str, Any]) -> None:
    box = entry["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise _bad_box(path, entry["id"], box)
    if not _is_number(entry.get("area", 0), largest=_LARGEST_AREA):
        raise _bad_area(path, entry["id"], entry["area"])
    if not isinstance(entry.get("iscrowd", 0), int):
        raise _bad_crowd(path, entry["id"], entry["iscrowd"])


def _bad_box(path: Path, box_id: object, box: object) -> DataError:
    return DataError(
        f"{path}: bbox of annotation {box_id} must be four finite numbers [x, y, width, height] "
        f"up to {_LARGEST_COORDINATE:g}, found {shown(box)}"
    )


def _bad_area(path: Path, box_id: object, area: object) -> DataError:
    return DataError(
        f"{path}: area of annotation {box_id} must be a finite number of at least 0, found "
        f"{shown(area)}; without the key it is width x height"
    )


def _bad_crowd(path: Path, box_id: object, crowd: object) -> DataError:
    return DataError(f"{path}: iscrowd of annotation {box_id} must be 0 or 1, found {shown(crowd)}")


def _is_integer(value: object) -> bool:
    """Whether a json value is an integer that fits int64."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object, largest: float = _LARGEST_COORDINATE) -> bool:
    """Whether a json value is a finite number of sane size (NaN compares false)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def _checked_classes(
    path: Path, classes: list[_Class], used: Set[int], notes: list[str]
) -> list[_Class]:
    """The categories by id, ids and names unique, without one that is a mere group.

    Roboflow writes the name of the whole dataset as a category that no box has and all others name
    as their supercategory; a model must not have a class for it.
    """
    classes = sorted(classes, key=lambda entry: entry.id)
    for group in classes:
        others = [entry for entry in classes if entry is not group]
        if (
            group.id not in used
            and group.supercategory in (None, "", "none")
            and others
            and all(entry.supercategory == group.name for entry in others)
        ):
            notes.append(
                f"category {group.id} {group.name} left out: it has no boxes and is the "
                f"supercategory of all others"
            )
            classes = others
            break
    for key in ("id", "name"):
        _check_unique(path, "categories", key, [getattr(entry, key) for entry in classes])
    return classes


def _check_unique(path: Path, part: str, key: str, values: Sequence[int | str]) -> None:
    counts = Counter(values)
    if len(counts) < len(values):
        repeated = [shown(value) for value, count in counts.items() if count > 1]
        raise DataError(
            f"{path}: {part} must have a {key!r} each; given more than once: {some(repeated)}"
        )


def _check_ids(path: Path, part: str, ids: Ints) -> None:
    if len(np.unique(ids)) < len(ids):
        _check_unique(path, part, "id", ids.tolist())


def _check_numbers(path: Path, columns: _Columns) -> None:
    wild = np.flatnonzero(~(np.abs(columns.boxes) <= _LARGEST_COORDINATE).all(1))
    if len(wild):
        raise _bad_box(path, columns.ids[wild[0]], columns.boxes[wild[0]].tolist())
    wild = np.flatnonzero((columns.areas < 0) | (columns.areas > _LARGEST_AREA))
    if len(wild):
        raise _bad_area(path, columns.ids[wild[0]], float(columns.areas[wild[0]]))
    wild = np.flatnonzero((columns.crowd != 0) & (columns.crowd != 1))
    if len(wild):
        raise _bad_crowd(path, columns.ids[wild[0]], int(columns.crowd[wild[0]]))


def _areas(columns: _Columns) -> Floats:
    """The areas; width x height if the file has none."""
    boxes = columns.boxes
    return np.where(np.isnan(columns.areas), boxes[:, 2] * boxes[:, 3], columns.areas)


def _positions(path: Path, key: str, columns: _Columns, named: Ints, ids: Ints) -> Ints:
    """The position in `ids` of each object's value of `key`."""
    order = np.argsort(ids)
    place = order[np.searchsorted(ids, named, sorter=order).clip(max=len(ids) - 1)]
    unknown = np.flatnonzero(ids[place] != named)
    if len(unknown):
        first = unknown[0]
        raise DataError(
            f"{path}: annotation {columns.ids[first]} names {key} {named[first]}, which the file "
            f"does not list; {len(unknown)} such annotations"
        )
    return place


def _sizes(
    path: Path, listed: Sequence[_Image], files: ImageFiles | None, notes: list[str]
) -> Ints:
    """(height, width) of each image; read from the files where the json lacks it.

    Without files, unknown sizes stay 0.
    """
    sizes = np.array([(entry.height or 0, entry.width or 0) for entry in listed], dtype=np.int64)
    if files is None:
        return sizes
    unknown = [row for row, entry in enumerate(listed) if None in (entry.height, entry.width)]
    if unknown:
        from detrelay.core.data.decode import upright_size  # torch: scoring files does without

        for row in unknown:
            sizes[row] = upright_size(files.open(row))
        notes.append(f"the size of {len(unknown)} images is taken from their files")
    bad = np.flatnonzero((sizes <= 0).any(1))
    if len(bad):
        height, width = sizes[bad[0]]
        raise DataError(
            f"{path}: image {listed[bad[0]].id} must have a positive width and height, found "
            f"{width} x {height}"
        )
    return sizes
