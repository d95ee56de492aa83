"""Tables of boxes: TensorFlow's, keras-retinanet's, DeepForest's, VoTT's and Open Images' csv.

Columns are read by name, in any order. A table without a header is read only if it is
keras-retinanet's, whose six columns are unmistakable.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.formats import SUFFIXES
from detrelay.core.data.readers.table import (
    ALL,
    TEST,
    TRAIN,
    VAL,
    Table,
    finish,
    image_files,
    split_folders,
    split_name,
    to_number,
)
from detrelay.core.data.sample import Category, shown, some
from detrelay.core.errors import DataError, one_line
from detrelay.core.plain_file import refuse_endless

# Names of the columns, in lower case, without spaces and underscores
_COLUMNS: Mapping[str, Sequence[str]] = {
    "image": ("filename", "image", "imagepath", "imageid", "imagename", "file", "path"),
    "label": ("class", "label", "labelname", "classname", "category", "name"),
    "left": ("xmin", "x1", "left"),
    "top": ("ymin", "y1", "top"),
    "right": ("xmax", "x2", "right"),
    "bottom": ("ymax", "y2", "bottom"),
    "width": ("width", "imagewidth"),
    "height": ("height", "imageheight"),
    "group": ("isgroupof",),
}
_NEEDED = ("image", "label", "left", "top", "right", "bottom")
_SCORES = ("score", "scores")
_RETINANET = ("image", "left", "top", "right", "bottom", "label")
_DECODED = "images were found by the name that %20 and the like stand for"
_NO_ANNOTATIONS = ("classes.csv", "class", "labels_map", "image")


@dataclass(slots=True)
class _Dialect:
    """How the rows of a file are read.

    Attributes:
        columns: position of each column by our name for it.
        fractions: corners are fractions of the image (Open Images).
        names: meanings of the file's class codes, if a list gives them.
        places: image files by name and by stem, filled as folders are searched.
        images: position, height and width by the name in a row; None for one that is missing.
    """

    columns: Mapping[str, int]
    fractions: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    places: dict[Path, dict[str, Path]] = field(default_factory=dict)
    images: dict[str, tuple[int, int, int] | None] = field(default_factory=dict)


def recognises(place: Path) -> bool:
    """Whether a place is a csv of boxes, or a folder with such files."""
    if place.is_file():
        return place.suffix.lower() in (".csv", ".tsv")
    return bool(_tables(place))


def read(place: Path, images: Path | None = None) -> dict[str, Annotations]:
    """The splits of csv annotations.

    Args:
        place: a file, or a folder with one for each split.
        images: folder of the images; None looks next to the file and in `images`.

    Raises:
        DataError: a file cannot be read or used; the message names it, and the line.
    """
    files = {ALL: place} if place.is_file() else _tables(place)
    tables = {split: _read(file, images) for split, file in files.items()}
    folders = [file.parent for file in files.values()]
    return finish(tables, _categories([place, *folders], tables))


def _tables(place: Path) -> dict[str, Path]:
    """The annotation file of each split in a folder."""
    found: dict[str, Path] = {}
    folders = split_folders(place)
    for split, folder in folders.items():
        if (folder / "_annotations.csv").is_file():
            found[split] = folder / "_annotations.csv"
    if found:
        return found
    files = [
        file
        for folder in (place, place / "annotations")
        for file in sorted(folder.glob("*.csv"))
        if not file.name.lower().startswith(_NO_ANNOTATIONS)
    ]
    for file in files:
        if (named := split_name(_first_word(file))) is not None:
            found.setdefault(named, file)
    if not found and len(files) == 1:
        found = {ALL: files[0]}
    return {split: found[split] for split in (TRAIN, VAL, TEST, ALL) if split in found}


def _first_word(file: Path) -> str:
    return file.stem.replace("-", "_").partition("_")[0]


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The non-empty rows, with their line numbers."""
    line = 0
    try:
        refuse_endless(file)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            head = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max(",;\t", key=head.count))
            for row in reader:
                line = reader.line_num
                if any(cell.strip() for cell in row):
                    yield line, [cell.strip() for cell in row]
    except csv.Error as error:
        raise DataError(f"{file} line {line + 1}: {one_line(error)}") from error
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text in UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {one_line(error)}") from error


def _read(file: Path, images: Path | None) -> Table:
    rows = _rows(file)
    number, head = next(rows, (0, []))
    if not head:
        raise DataError(f"{file} is empty; expected a table of boxes")
    dialect = _dialect(file, head)
    folder = file.parent if images is None else Path(images)
    if not folder.is_dir():
        raise DataError(f"no image folder {folder}; name the folder that holds the images")
    table = Table(file, folder)
    missing: list[str] = []
    if dialect.columns.keys() == set(_RETINANET) and not _is_head(head):
        _add(table, dialect, head, f"{file} line {number}", missing)
    for number, row in rows:
        _add(table, dialect, row, f"{file} line {number}", missing)
    if missing:
        names = list(dict.fromkeys(missing))
        raise DataError(
            f"{file}: {len(names)} of its images are not in {folder}: {some(names)}; name the "
            f"folder that holds the images"
        )
    rowless = sum(len(image_files(place)) for place in {file.parent for file in table.files})
    if rowless > len(table):
        table.note(
            "images beside them have no row and are left out (an image without objects has a row "
            "of its own, with nothing or zeros in it)",
            rowless - len(table),
        )
    return table


def _plain(text: str) -> str:
    return text.lower().replace("_", "").replace(" ", "").replace("-", "")


def _is_head(row: Sequence[str]) -> bool:
    known = {name for names in _COLUMNS.values() for name in names}
    return sum(_plain(cell) in known for cell in row) >= len(_NEEDED)


def _dialect(file: Path, head: Sequence[str]) -> _Dialect:
    """The columns by their names."""
    plain = [_plain(cell) for cell in head]
    if not _is_head(head):
        if len(head) == len(_RETINANET) and Path(head[0]).suffix.lower() in SUFFIXES:
            return _Dialect({name: row for row, name in enumerate(_RETINANET)})
        lacking = [n for n in _NEEDED if not any(name in plain for name in _COLUMNS[n])]
        raise DataError(
            f"{file}: its first line must name the columns, such as filename, class, xmin, ymin, "
            f"xmax, ymax; there is none for {', '.join(lacking)} in {shown(list(head))}"
        )
    if any(name in plain for name in _SCORES):
        raise DataError(f"{file} has a column of scores: detections are no truth to learn from")
    columns = {}
    for name, known in _COLUMNS.items():
        row = next((plain.index(word) for word in known if word in plain), None)
        if row is not None:
            columns[name] = row
    if absent := [name for name in _NEEDED if name not in columns]:
        raise DataError(f"{file}: no column for {', '.join(absent)} in {shown(list(head))}")
    fractions = "isgroupof" in plain
    names: dict[str, str] = {}
    if fractions:
        for list_file in sorted(file.parent.glob("*class-descriptions*.csv")):
            names |= {row[0]: row[1] for _, row in _rows(list_file) if len(row) > 1}
    return _Dialect(columns, fractions, names)


def _add(
    table: Table, dialect: _Dialect, row: Sequence[str], where: str, missing: list[str]
) -> None:
    columns = dialect.columns
    if len(row) <= max(columns.values()):
        raise DataError(f"{where}: expected {max(columns.values()) + 1} columns, found {len(row)}")
    name = row[columns["image"]]
    if name not in dialect.images:  # most rows name the same image as the previous row
        dialect.images[name] = _image(table, dialect, row, where)
    known = dialect.images[name]
    if known is None:
        missing.append(name)
        return
    image, height, width = known
    cells = [row[columns[name]] for name in ("left", "top", "right", "bottom")]
    if not any(cells):
        return
    if any("," in cell for cell in cells):
        table.note("rows with decimal commas")
    corners = [to_number(cell.replace(",", "."), where) for cell in cells]
    if not any(corners):  # DeepForest's row for an image without objects
        table.note("rows of zeros taken as images without objects")
        return
    if dialect.fractions:
        corners = [value * side for value, side in zip(corners, (width, height) * 2, strict=True)]
    label = row[columns["label"]]
    if not label:
        raise DataError(f"{where}: the box has no class")
    table.box(image, dialect.names.get(label, label), corners[:2], corners[2:])
    if "group" in columns and row[columns["group"]] == "1":
        table.crowd()


def _image(
    table: Table, dialect: _Dialect, row: Sequence[str], where: str
) -> tuple[int, int, int] | None:
    columns = dialect.columns
    path = _find(table, dialect, row[columns["image"]])
    if path is None:
        return None
    if dialect.fractions or not {"width", "height"} <= columns.keys():
        return table.image(path)
    height, width = (
        int(to_number(row[columns[key]], f"{where} {key}")) for key in ("height", "width")
    )
    return table.image(path, (height, width))


def _find(table: Table, dialect: _Dialect, name: str) -> Path | None:
    """The image file: under the folder, or by its name alone if another machine wrote the path."""
    name = name.replace("\\", "/")
    for text in (name, unquote(name)):
        path = table.folder / text
        if ".." not in path.parts and not Path(text).is_absolute() and path.is_file():
            if text != name:
                table.note(_DECODED)
            return path
    own = _first_word(table.source)  # TensorFlow's train_labels.csv is next to the folder train
    for folder in (table.folder, table.folder / "images", table.folder / own):
        if folder not in dialect.places:
            files = image_files(folder) if folder.is_dir() else []
            dialect.places[folder] = {path.stem: path for path in files}
            dialect.places[folder] |= {path.name: path for path in files}
        known = dialect.places[folder]
        for text in (name, unquote(name)):
            path_or_none = known.get(Path(text).name)
            if path_or_none is not None:
                if text != name:
                    table.note(_DECODED)
                if "/" in name:
                    table.note("images were found by their name alone")
                return path_or_none
    return None


def _categories(places: Sequence[Path], tables: Mapping[str, Table]) -> list[Category] | None:
    """The ids of `classes.csv` (name, id), if there is one."""
    for place in places:
        file = place / "classes.csv"
        if place.is_dir() and file.is_file():
            rows = [row for _, row in _rows(file)]
            try:
                categories = [Category(int(row[1]), row[0]) for row in rows]
            except (ValueError, IndexError):
                raise DataError(f"{file}: expected a name and a number in each line") from None
            known = {category.name for category in categories}
            unknown = {label for table in tables.values() for label in table.labels} - known
            if unknown:
                if place == places[0]:
                    raise DataError(
                        f"{file} lacks categories of the boxes: {some(sorted(unknown))}"
                    )
                continue
            return categories
    return None
