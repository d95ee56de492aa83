"""Shared by the readers: rows into columns, splits in folders, numbers and XML from files."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import msgspec
import numpy as np

from detrelay.core.data.annotations import Annotations, alike_names, doubtful_boxes
from detrelay.core.data.decode import upright_size
from detrelay.core.data.formats import SUFFIXES
from detrelay.core.data.images import ImageFiles
from detrelay.core.data.sample import Category, shown, some
from detrelay.core.errors import DataError, one_line
from detrelay.core.plain_file import refuse_endless

TRAIN, VAL, TEST, ALL = "train", "val", "test", "all"
_SPLITS = {
    TRAIN: TRAIN,
    "training": TRAIN,
    VAL: VAL,
    "valid": VAL,
    "validation": VAL,
    "dev": VAL,
    TEST: TEST,
    "testing": TEST,
}
_LARGEST = 1e9


def split_name(text: str) -> str | None:
    """The split of a folder or list of that name; None for any other name."""
    return _SPLITS.get(text.lower())


def split_folders(place: Path) -> dict[str, Path]:
    """The folders of a place that are named like splits, by split."""
    found: dict[str, Path] = {}
    for folder in sorted(place.iterdir()):
        split = split_name(folder.name)
        if split is not None and folder.is_dir():
            found.setdefault(split, folder)
    return {split: found[split] for split in (TRAIN, VAL, TEST) if split in found}


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder in the order of their names, without hidden ones."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def images_by(key: Literal["name", "stem"], folders: Iterable[Path]) -> dict[str, Path]:
    """Image files of several folders by their name or its stem; the first folder wins."""
    found: dict[str, Path] = {}
    for folder in reversed([folder for folder in folders if folder.is_dir()]):
        found |= {getattr(path, key): path for path in image_files(folder)}
    return found


def refuse_missing(file: Path, missing: Sequence[str], folders: Iterable[Path]) -> None:
    """Refuse a file some of whose images are in none of the folders.

    Raises:
        DataError: names of images are missing.
    """
    if missing:
        raise DataError(
            f"{file}: {len(missing)} images are not in {some(list(map(str, folders)))}: "
            f"{some(missing)}; name the folder that holds the images"
        )


def only_json(folder: Path) -> Path | None:
    """The json file of a folder; None if there are several, or none."""
    files = sorted(folder.glob("*.json"))
    return files[0] if len(files) == 1 else None


def start_of_json(file: Path) -> bytes:
    """The first bytes of a json file, from its first bracket on; empty for other files."""
    if file.suffix.lower() != ".json" or not file.is_file():
        return b""
    with file.open("rb") as stream:
        return stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    try:
        refuse_endless(path)
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text in UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file.

    Raises:
        DataError: it cannot be read, is not XML, or defines entities, which can grow without end.
    """
    with _xml_of(path) as data:
        return ElementTree.fromstring(data)


def iterate_xml(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    """The elements of an XML file, the root first, each at its "start" and, complete, at its "end".

    Raises:
        DataError: as `read_xml`.
    """
    with _xml_of(path) as data:
        yield from ElementTree.iterparse(BytesIO(data), events=("start", "end"))


@contextmanager
def _xml_of(path: Path) -> Iterator[bytes]:
    """The content of a file, and one kind of error for all that is wrong with it."""
    try:
        refuse_endless(path)
        data = path.read_bytes()
        if b"<!ENTITY" in data.replace(b"\0", b""):
            raise DataError(f"{path} defines XML entities, which are not read; remove them")
        yield data
    except ElementTree.ParseError as error:
        raise DataError(f"{path} is no XML, or it is damaged: {one_line(error)}") from error
    except (OSError, ValueError, LookupError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def read_json_list(path: Path) -> Iterator[Any]:
    """The entries of a json list one after the other, so that not all are in memory at once.

    Raises:
        DataError: the file cannot be read, is not json, or is no list.
    """
    try:
        refuse_endless(path)
        entries = msgspec.json.decode(path.read_bytes(), type=list[msgspec.Raw])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        whole = read_json(path)  # whose errors say more, and which takes NaN and byte order marks
        if not isinstance(whole, list):
            raise DataError(f"{path}: expected a list, found {shown(whole)}") from None
        yield from whole
    else:
        for entry in entries:
            try:
                yield json.loads(bytes(entry))
            except (ValueError, RecursionError) as error:  # msgspec has not looked inside
                raise DataError(f"cannot read {path} as json: {one_line(error)}") from error


def read_json(path: Path) -> Any:
    """The content of a json file.

    Raises:
        DataError: it cannot be read, or is not json.
    """
    try:
        refuse_endless(path)
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except RecursionError:
        raise DataError(f"cannot read {path} as json: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} as json: {one_line(error)}") from error


def to_number(value: object, where: str) -> float:
    """A finite number of sane size, from text or from json.

    Raises:
        DataError: it is not; the message begins with `where`.
    """
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not abs(number) <= _LARGEST:
        raise DataError(f"{where}: expected a number up to {_LARGEST:g}, found {shown(value)}")
    return number


class Table:
    """Collects the images and boxes of a split row by row.

    Args:
        source: the file or folder that is read, for messages.
        folder: what image names are relative to.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.folder = folder
        self.notes: Counter[str] = Counter()
        self.labels: dict[str, int] = {}
        self._names: list[str] = []
        self._sizes = array("q")
        self._numbers = array("d")
        self._whole = array("q")
        self._of_file: dict[Path, int] = {}

    def __len__(self) -> int:
        return len(self._names)

    @property
    def files(self) -> Collection[Path]:
        """The image files so far."""
        return self._of_file.keys()

    def note(self, what: str, count: int = 1) -> None:
        """Count something to be reported, such as `rows given twice left out`."""
        self.notes[what] += count

    def image(self, file: Path, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Add an image, or find it again.

        Args:
            file: where it is.
            size: (height, width); None reads it from the file.

        Returns:
            Its position, height and width.
        """
        known = self._of_file.get(file)
        if known is None:
            height, width = upright_size(file) if size is None else size
            if min(height, width) < 1:
                raise DataError(
                    f"{self.source}: image {file.name} must have a positive width and height, "
                    f"found {width} x {height}"
                )
            known = self._of_file[file] = len(self._names)
            # os.path: a path on another drive or outside the folder stays absolute
            name = os.path.relpath(file, self.folder)
            inside = not name.startswith("..")
            self._names.append(Path(name).as_posix() if inside else str(file.absolute()))
            self._sizes.extend((height, width))
        return known, self._sizes[2 * known], self._sizes[2 * known + 1]

    def box(self, image: int, label: str, low: Sequence[float], high: Sequence[float]) -> None:
        """Add a box by its corners, pixels, and the name of its category."""
        row = self.labels.setdefault(label, len(self.labels))
        self._whole.extend((image, row, 0))
        width, height = high[0] - low[0], high[1] - low[1]
        self._numbers.extend((low[0], low[1], width, height, width * height))

    def area(self, pixels: float) -> None:
        """Set the outline area of the box added last."""
        self._numbers[-1] = pixels

    def crowd(self) -> None:
        """Mark the box added last as a crowd."""
        self._whole[-1] = 1

    def finish(
        self, classes: Mapping[str, Category], first_image: int, first_box: int
    ) -> Annotations:
        """The columns; `classes` has each label."""
        categories = tuple(sorted(set(classes.values()), key=lambda category: category.id))
        position = {category.id: row for row, category in enumerate(categories)}
        of_label = np.array([position[classes[label].id] for label in self.labels], dtype=np.int64)
        image, label, crowd = np.array(self._whole, dtype=np.int64).reshape(-1, 3).T.copy()
        boxes, areas = np.split(np.array(self._numbers).reshape(-1, 5), [4], axis=1)
        sizes = np.array(self._sizes, dtype=np.int64).reshape(-1, 2)
        notes = [f"{count} {what}" for what, count in self.notes.items()]
        if doubt := doubtful_boxes(boxes, sizes[image][:, ::-1]):
            notes.append(doubt)
        return Annotations(
            source=str(self.source),
            categories=categories,
            images=ImageFiles(self.folder, self._names, str(self.source), allow_outside=True),
            image_ids=np.arange(len(self)) + first_image,
            sizes=sizes,
            boxes_xywh=boxes.copy(),
            box_image=image,
            box_class=of_label[label],
            box_ids=np.arange(len(boxes)) + first_box,
            areas=areas[:, 0].copy(),
            crowd=crowd.astype(np.bool_),
            notes=tuple(notes),
        )


def finish(
    tables: Mapping[str, Table], categories: Sequence[Category] | None = None
) -> dict[str, Annotations]:
    """The splits of a place: one list of categories, ids of images and boxes unique over all.

    Args:
        tables: by split.
        categories: those of the format, with ids; None numbers the names that boxes have from 1,
            in alphabetical order.

    Raises:
        DataError: there are no images or no categories.
    """
    own = categories is not None
    if categories is None:
        names = sorted({label for table in tables.values() for label in table.labels})
        categories = [Category(number, name) for number, name in enumerate(names, start=1)]
    sources = some(sorted({str(table.source) for table in tables.values()}))
    if not any(len(table) for table in tables.values()):
        raise DataError(f"{sources}: no images found; there is nothing to use")
    if not categories:
        raise DataError(f"{sources}: no box and no list of categories; there is nothing to learn")
    classes = {category.name: category for category in categories}
    result: dict[str, Annotations] = {}
    images = boxes = 1
    for split, table in tables.items():
        found = table.finish(classes, images, boxes)
        images, boxes = images + len(found), boxes + len(found.box_ids)
        result[split] = replace(found, own_ids=own, notes=(*found.notes, *alike_names(classes)))
    return result
