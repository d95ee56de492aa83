"""Data sets in the layout of the Hugging Face Hub, read by `datasets`.

A data set has an image column and a column `objects`: a table or a list with boxes and categories.
Boxes are x, y, width, height in pixels, as the Hub's guide has it; `hub_xyxy` reads corners.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from detrelay.core.data.annotations import Annotations, Ints
from detrelay.core.data.decode import upright_size
from detrelay.core.data.readers.table import TRAIN, Table, finish, split_name, to_number
from detrelay.core.data.sample import Category, shown, some
from detrelay.core.errors import DataError, one_line

_IMAGE = ("image", "img", "picture")
_OBJECTS = ("objects", "annotations", "faces", "object")
_BOX = ("bbox", "bboxes", "boxes", "box")
_LABEL = ("category", "categories", "label", "labels", "category_id", "class", "class_label")
_CROWD = ("iscrowd", "is_crowd")


class HubImages:
    """Images in a column of a data set, which `datasets` maps from disk into shared memory.

    Args:
        data: the data set; its image column is not decoded.
        column: name of the image column.
        names: a name for each image.
        source: what was read, for messages.
    """

    def __init__(self, data: Any, column: str, names: Sequence[str], source: str) -> None:
        self._data = data
        self._column = column
        self._names = np.array(names, dtype=np.dtypes.StringDType())
        self._source = source

    def name(self, index: int) -> str:
        """The file name of image `index` before it went into the data set, or a number."""
        return str(self._names[index])

    def open(self, index: int) -> Path | BytesIO:
        """The encoded bytes of image `index`, or its file."""
        return _file_of(self._data[index][self._column], f"{self._source} row {index}")

    def missing(self) -> list[str]:
        """None: a data set holds its images."""
        return []

    def place(self) -> str:
        """Where the images are."""
        return self._source

    def advice(self, name: str) -> str:
        """Never needed: see `missing`."""
        return f"{self._source} should hold {name}"


def recognises(place: Path) -> bool:
    """Whether a place is a parquet file or a folder that `datasets` reads as images with boxes."""
    if place.is_file():
        return place.suffix == ".parquet" or place.name == "metadata.jsonl"
    return (
        any(place.glob("*/metadata.jsonl"))
        or (place / "metadata.jsonl").is_file()
        or any(place.glob("*.parquet"))
        or any(place.glob("data/*.parquet"))
        or (place / "dataset_dict.json").is_file()
    )


def read(
    place: Path | str, images: Path | None = None, *, corners: bool = False
) -> dict[str, Annotations]:
    """The splits of a data set.

    Args:
        place: a parquet file, a folder, or (as text) a name on the Hub.
        images: must be None: the images are part of the data set.
        corners: boxes are x1, y1, x2, y2.

    Raises:
        DataError: the data set cannot be loaded or used.
    """
    if images is not None:
        raise DataError(f"{place}: its images are in the data set; leave out the image folder")
    loaded = _load(place)
    columns = {split: _columns(data, f"{place} ({split})") for split, data in loaded.items()}
    loaded = {split: _undecoded(data, columns[split][0]) for split, data in loaded.items()}
    first = next(iter(columns.values()))
    names = _class_names(first[2])
    tables = {}
    stores = {}
    ids: dict[str, list[Any]] = {}
    box_ids: dict[str, list[Any]] = {}
    for split, data in loaded.items():
        image, objects, _ = columns[split]
        source = f"{place} ({split})"
        tables[split] = Table(Path(str(place)), Path())
        rows = _Rows(tables[split], source, names, corners)
        for row in data:
            rows.add(row, image, row[objects])
        stores[split] = HubImages(data, image, rows.names, source)
        ids[split] = rows.ids
        box_ids[split] = rows.box_ids
    labels = {label for table in tables.values() for label in table.labels}
    categories = _with_ids(names, labels)
    return {
        split: replace(
            found,
            images=stores[split],
            image_ids=_own_ids(ids, split, found.image_ids),
            box_ids=_own_ids(box_ids, split, found.box_ids),
        )
        for split, found in finish(tables, categories).items()
    }


read_corners = partial(read, corners=True)


@dataclass(frozen=True)
class Stream:
    """A split whose rows come one after the other.

    Attributes:
        data: the `datasets.IterableDataset`; images are not decoded.
        source: what is read, for messages.
        categories: in the order of the class indices.
        own_ids: see `Annotations`.
        rows: number of rows that the data set states; None if it states none.
        image: name of the image column.
        objects: name of the column of objects.
        class_names: those of the ClassLabel; None if there is none.
        corners: boxes are x1, y1, x2, y2.
    """

    data: Any
    source: str
    categories: tuple[Category, ...]
    own_ids: bool
    rows: int | None
    image: str
    objects: str
    class_names: Sequence[str] | None
    corners: bool

    def annotations(self, row: Mapping[str, Any]) -> Annotations:
        """A row as a split of one image, as `read` gives it; the id is 0 if the row has none.

        Raises:
            DataError: the row cannot be used.
        """
        rows = _Rows(Table(Path(self.source), Path()), self.source, self.class_names, self.corners)
        rows.add(row, self.image, row[self.objects], _name_in_stream(row, self))
        known = {category.name for category in self.categories}
        if strange := [label for label in rows.table.labels if label not in known]:
            raise DataError(
                f"{self.source}, {_name_in_stream(row, self)}: category {strange[0]!r} is not in "
                f"data.categories, which must name all of a stream without a ClassLabel"
            )
        (found,) = finish({TRAIN: rows.table}, self.categories).values()
        own = rows.ids[0] if type(rows.ids[0]) is int else 0
        return replace(
            found,
            images=HubImages([row], self.image, rows.names, self.source),
            image_ids=np.array([own], dtype=np.int64),
        )


def stream(place: Path | str, names: Sequence[str] = (), *, corners: bool = False) -> Stream:
    """The training split of a data set; no row is read yet.

    Args:
        place: see `read`.
        names: the categories of a data set that does not name them by a ClassLabel.
        corners: boxes are x1, y1, x2, y2.

    Raises:
        DataError: it cannot be loaded or has no training split, or its categories are not known.
    """
    if isinstance(place, Path) and (place / "dataset_dict.json").is_file():
        raise DataError(
            f"{place} is mapped into memory as it is, not read from end to end; set "
            f"data.stream=false"
        )
    loaded = _load(place, streaming=True)
    data = loaded.get(TRAIN, next(iter(loaded.values())) if len(loaded) == 1 else None)
    if data is None:
        raise DataError(f"{place} has no split {TRAIN!r}, only {', '.join(loaded)}")
    source = f"{place} (stream)"
    image, objects, feature = _columns(data, source)
    class_names = _class_names(feature)
    if class_names is None and not names:
        raise DataError(
            f"{source}: its categories have no names before the rows are read (no ClassLabel); "
            f"name them all in data.categories"
        )
    known = _with_ids(class_names, names)
    categories = known or [Category(i, name) for i, name in enumerate(sorted(names), start=1)]
    stated = (data.info.splits or {}).values()
    counts = {split_name(part.name) or part.name: part.num_examples for part in stated}
    return Stream(
        data=_undecoded(data, image),
        source=source,
        categories=tuple(categories),
        own_ids=known is not None,
        rows=counts.get(TRAIN) or None,
        image=image,
        objects=objects,
        class_names=class_names,
        corners=corners,
    )


def _with_ids(class_names: Sequence[str] | None, labels: Collection[str]) -> list[Category] | None:
    """The categories of a ClassLabel, or of labels that are numbers; None if they have no ids."""
    if class_names is not None:
        return [Category(number, name) for number, name in enumerate(class_names)]
    if not all(label.isdigit() for label in labels):
        return None
    return [Category(number, str(number)) for number in sorted(set(map(int, labels)))]


def _name_in_stream(row: Mapping[str, Any], part: Stream) -> str:
    """What to call a row whose number is not known."""
    image = row[part.image]
    path = image.get("path") if isinstance(image, dict) else None
    number = row.get("image_id", row.get("id"))
    return f"image {Path(path).name if path else number}"


def _own_ids(ids: Mapping[str, Sequence[Any]], split: str, numbered: Ints) -> Ints:
    """The ids of the data set, if they are whole numbers and unique over all splits."""
    given = [number for part in ids.values() for number in part]
    if len(set(map(str, given))) < len(given) or any(type(number) is not int for number in given):
        return numbered
    return np.array(ids[split], dtype=np.int64)


def _load(place: Path | str, *, streaming: bool = False) -> dict[str, Any]:
    """The splits as `datasets` gives them, images not decoded, in the order train, val, test."""
    import datasets

    datasets.utils.logging.disable_progress_bar()
    try:
        if isinstance(place, Path):
            place = place.resolve()  # of "." it would take no name
        if isinstance(place, str):
            found = datasets.load_dataset(place, streaming=streaming)
        elif place.is_file():
            kind = "parquet" if place.suffix == ".parquet" else "imagefolder"
            files = (
                {"data_files": str(place)} if kind == "parquet" else {"data_dir": str(place.parent)}
            )
            found = datasets.load_dataset(kind, **files, streaming=streaming)
        elif (place / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(place))
        else:
            found = datasets.load_dataset(str(place), streaming=streaming)
    except (
        Exception
    ) as error:  # datasets hands on errors of Arrow, fsspec, huggingface_hub and json
        raise DataError(f"cannot load {place} by datasets: {one_line(error)}") from error
    splits: dict[str, Any] = {}
    for name, data in found.items():
        splits.setdefault(split_name(name) or name, data)
    order = {name: row for row, name in enumerate(("train", "val", "test"))}
    return dict(sorted(splits.items(), key=lambda item: order.get(item[0], len(order))))


def _columns(data: Any, source: str) -> tuple[str, str, Any]:
    """Names of the image and object columns, and the feature of the categories."""
    import datasets

    names = list(data.features or ())
    image = next((name for name in names if isinstance(data.features[name], datasets.Image)), None)
    image = image or next((name for name in _IMAGE if name in names), None)
    objects = next((name for name in _OBJECTS if name in names), None)
    if image is None or objects is None:
        lacking = "image" if image is None else "objects"
        raise DataError(
            f"{source}: no column {lacking!r}; its columns are {', '.join(names)}; rename them "
            f"(datasets: rename_column), objects holding bbox and category"
        )
    return image, objects, data.features[objects]


def _undecoded(data: Any, image: str) -> Any:
    """The same data set, whose images come as files or bytes."""
    import datasets

    if not isinstance(data.features[image], datasets.Image):
        return data
    return data.cast_column(image, datasets.Image(decode=False))


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, wherever lists hide it."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _class_names(inner)
    if isinstance(feature, list) and feature:
        return _class_names(feature[0])
    if isinstance(feature, dict):
        for key in _LABEL:
            if key in feature and (names := _class_names(feature[key])) is not None:
                return names
    return None


def _file_of(value: object, where: str) -> Path | BytesIO:
    if isinstance(value, dict):
        if value.get("bytes"):
            return BytesIO(value["bytes"])
        path = value.get("path")
        if isinstance(path, str):
            return _bytes_at(path, where) if "://" in path else Path(path)
    raise DataError(f"{where}: expected an image, found {shown(value)}")


def _bytes_at(address: str, where: str) -> BytesIO:
    """An image of a streamed folder, which `datasets` leaves where it is."""
    import fsspec

    try:
        with fsspec.open(address, "rb") as file:
            return BytesIO(file.read())
    except Exception as error:  # each kind of address has its own
        raise DataError(f"{where}: cannot read {address}: {one_line(error)}") from error


class _Rows:
    """Puts the rows of a split into a table."""

    def __init__(
        self, table: Table, source: str, names: Sequence[str] | None, corners: bool
    ) -> None:
        self.table = table
        self.source = source
        self.class_names = names
        self.corners = corners
        self.names: list[str] = []
        self.ids: list[Any] = []
        self.box_ids: list[Any] = []

    def add(
        self, row: Mapping[str, Any], image: str, objects: object, name: str | None = None
    ) -> None:
        number = len(self.names)
        where = f"{self.source} row {number}" if name is None else f"{self.source}, {name}"
        file = _file_of(row[image], where)
        size = (row.get("height"), row.get("width"))
        if not all(type(side) is int and side > 0 for side in size):
            size = upright_size(file, name=where)
        path = row[image].get("path") if isinstance(row[image], dict) else None
        self.names.append(Path(path).name if path else f"{number}.jpg")
        self.ids.append(row.get("image_id", row.get("id")))
        position, *_ = self.table.image(Path(str(number)), size)  # type: ignore[arg-type]
        for box, label, crowd, area, box_id in self._objects(objects, where):
            if not isinstance(box, list | tuple) or len(box) != 4:
                raise DataError(f"{where}: a bbox must be four numbers, found {shown(box)}")
            x, y, right, low = (to_number(value, where) for value in box)
            if not self.corners:
                right, low = x + right, y + low
            self.table.box(position, self._label(label, where), (x, y), (right, low))
            if crowd:
                self.table.crowd()
            if area is not None:
                self.table.area(to_number(area, f"{where} area"))
            self.box_ids.append(box_id)

    def _objects(self, objects: object, where: str) -> list[tuple[Any, ...]]:
        """Box, category, crowd flag, area and id of each object, from a table or a list."""
        if objects is None:
            self.table.note("rows whose objects are null, taken as images without objects")
            return []
        if isinstance(objects, list):
            if not all(isinstance(entry, dict) for entry in objects):
                raise DataError(
                    f"{where}: objects must be a list of tables, found {shown(objects)}"
                )
            return [
                (
                    _pick(entry, _BOX, where),
                    _pick(entry, _LABEL, where),
                    *(_pick(entry, names) for names in (_CROWD, ("area",), ("id",))),
                )
                for entry in objects
            ]
        if not isinstance(objects, dict):
            raise DataError(f"{where}: objects must be a table or a list, found {shown(objects)}")
        boxes = _pick(objects, _BOX, where) or []
        labels = _pick(objects, _LABEL, where) or []
        others = [
            _pick(objects, names) or [None] * len(boxes) for names in (_CROWD, ("area",), ("id",))
        ]
        if len({len(boxes), len(labels), *map(len, others)}) > 1:
            raise DataError(f"{where}: {len(boxes)} boxes, but {len(labels)} categories")
        return list(zip(boxes, labels, *others, strict=True))

    def _label(self, label: object, where: str) -> str:
        if isinstance(label, str):
            return label
        if type(label) is int and self.class_names is None:
            if label < 0:
                raise DataError(f"{where}: category {label} is below 0")
            return str(label)
        if type(label) is int and self.class_names and 0 <= label < len(self.class_names):
            return self.class_names[label]
        raise DataError(
            f"{where}: a category must be a name or a number"
            + (f" below {len(self.class_names)}" if self.class_names else "")
            + f", found {shown(label)}"
        )


def _pick(entry: Mapping[str, Any], names: Sequence[str], where: str = "") -> Any:
    """The value under the first of several names; needed where `where` is given."""
    for name in names:
        if name in entry:
            return entry[name]
    if where:
        raise DataError(f"{where}: objects have no {names[0]!r}, only {some(list(entry), 8)}")
    return None
