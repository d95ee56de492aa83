"""YOLO text labels: a row of fractions per object, in one text file per image.

Layouts: `data.yaml` (Ultralytics, Roboflow), darknet's `obj.data`, and folders of labels with a
list of names next to them. Rows of polygons and of four corners become their enclosing boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.kept_ids import FILE as KEPT_IDS
from detrelay.core.data.readers.table import (
    ALL,
    TEST,
    TRAIN,
    VAL,
    Table,
    finish,
    image_files,
    read_text,
    split_folders,
    to_number,
)
from detrelay.core.data.sample import Category, shown, some
from detrelay.core.errors import DataError, one_line

_NAME_FILES = (
    "classes.txt",
    "obj.names",
    "predefined_classes.txt",
    "labels.txt",
    "_darknet.labels",
)
# Rounding may give a fraction slightly over 1; a pixel coordinate is nearly always over this.
_LARGEST_FRACTION = 1.5


@dataclass(frozen=True, slots=True)
class _Names:
    """Category names by YOLO id, and how to read rows.

    Attributes:
        source: the file with the names.
        by_id: name of each id.
        keypoints: rows have a box and then key points, which are ignored.
    """

    source: Path
    by_id: Mapping[int, str]
    keypoints: bool = False


def recognises(place: Path) -> bool:
    """Whether a place looks like YOLO data."""
    if place.is_file():
        return place.suffix.lower() in (".yaml", ".yml") or place.name == "obj.data"
    return (
        _yaml_in(place) is not None
        or (place / "obj.data").is_file()
        or (_names_in(place) is not None and next(place.rglob("*.txt"), None) is not None)
    )


def read(place: Path, images: Path | None = None) -> dict[str, Annotations]:
    """The splits of YOLO data.

    Args:
        place: `data.yaml`, `obj.data`, or a folder with one of them or with a list of names.
        images: folder of the images, if they are not where the format expects them.

    Raises:
        DataError: a file cannot be read or used; the message names it, and the line.
    """
    if place.is_dir():
        file = _yaml_in(place)
        if file is None and (place / "obj.data").is_file():
            file = place / "obj.data"
        if file is None:
            return _from_folders(place, images)
        place = file
    return _from_darknet(place) if place.name == "obj.data" else _from_yaml(place, images)


def _yaml_in(folder: Path) -> Path | None:
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (folder / name).is_file():
            return folder / name
    files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    return files[0] if len(files) == 1 and "names" in read_text(files[0]) else None


def _names_in(folder: Path) -> Path | None:
    files = [folder / name for name in _NAME_FILES if (folder / name).is_file()]
    files += sorted(folder.glob("*.names"))
    return files[0] if files else None


def _from_yaml(file: Path, images: Path | None) -> dict[str, Annotations]:
    try:
        content: Any = yaml.load(read_text(file), Loader=yaml.BaseLoader)  # all values stay text
    except RecursionError:
        raise DataError(f"cannot read {file} as YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {file} as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected keys such as train, val and names, found no mapping")
    names = _checked(_Names(file, _names_of(file, content), "kpt_shape" in content))
    roots = [file.parent]
    if isinstance(content.get("path"), str) and content["path"]:
        roots.insert(0, file.parent / content["path"])
    tables = {}
    for split, keys in (
        (TRAIN, ("train",)),
        (VAL, ("val", "valid", "validation")),
        (TEST, ("test",)),
    ):
        entries = next((content[key] for key in keys if content.get(key)), None)
        if entries is None:
            continue
        entries = [entries] if isinstance(entries, str) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise DataError(
                f"{file}: {split} must be a path or a list of paths, found {shown(entries)}"
            )
        table = Table(file, file.parent)
        if len(roots) > 1 and not roots[0].is_dir():
            table.note("path that is not there left out: folders are taken beside the file")
        places = [_resolve(file, split, roots, entry) for entry in entries]
        if None in places:
            if split == TEST:  # exports name it whether it exists or not
                continue
            tried = [str(root / entry) for root in roots for entry in entries]
            raise DataError(f"{file}: {split} is not there; tried {some(tried, 6)}")
        for place in places:
            assert place is not None
            _add_images(table, names, _listed(place), images)
        tables[split] = table
    if not tables:
        raise DataError(f"{file}: names no images; expected the keys train and val")
    return _finish(tables, names, content.get("nc"))


def _names_of(file: Path, content: Mapping[str, Any]) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return dict(enumerate(names))
    if isinstance(names, dict) and all(isinstance(name, str) for name in names.values()):
        try:
            return {int(number): name for number, name in names.items()}
        except ValueError as error:
            raise DataError(f"{file}: names must be numbered from 0: {one_line(error)}") from error
    raise DataError(
        f"{file}: names must be a list of category names, or a map from number to name; "
        + (f"found {shown(names)}" if "names" in content else "it is missing")
    )


def _resolve(file: Path, split: str, roots: Sequence[Path], entry: str) -> Path | None:
    """The path of an entry: as written, or without the `../` that Roboflow prepends."""
    entry = entry.replace("\\", "/")
    bare = entry
    while bare.startswith(("../", "./")):
        bare = bare.partition("/")[2]
    for root in roots:
        for text in (entry, bare):
            if (root / text).exists():
                return root / text
    return None


def _listed(place: Path) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    if place.is_dir():
        found = image_files(place)
        if not found and (place / "images").is_dir():
            found = image_files(place / "images")
        if not found:
            raise DataError(f"{place}: no images in this folder")
        return found
    files: list[Path] = []
    missing: list[str] = []
    for line in read_text(place).splitlines():
        if line.strip():
            path = _find(place.parent, line.strip().replace("\\", "/"))
            if path is None:
                missing.append(line.strip())
            else:
                files.append(path)
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(missing) + len(files)} images that it names are not "
            f"there: {some(missing)}"
        )
    return files


def _find(folder: Path, name: str) -> Path | None:
    """A listed image; lists contain folders of the machine they were written on."""
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    if ".." in parts:  # could point to any file
        return None
    for start in range(len(parts)):
        path = folder.joinpath(*parts[start:])
        if path.is_file():
            return path
    return None


def _from_darknet(file: Path) -> dict[str, Annotations]:
    pairs = [line.partition("=") for line in read_text(file).splitlines() if "=" in line]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    folder = file.parent
    listed = _find(folder, values.get("names", "obj.names"))
    if listed is None:
        raise DataError(
            f"{file}: the list of names {values.get('names', 'obj.names')} is not there"
        )
    names = _checked(_Names(listed, _numbered(listed)))
    tables = {}
    for key, split in (("train", TRAIN), ("valid", VAL), ("test", TEST)):
        if not values.get(key):
            continue
        images = _find(folder, values[key])
        if images is None:
            raise DataError(f"{file}: the list {values[key]} of {key} is not there")
        tables[split] = Table(images, folder)
        _add_images(tables[split], names, _listed(images), None)
    if not tables:
        raise DataError(f"{file}: names no list of images; expected the keys train and valid")
    return _finish(tables, names, values.get("classes"))


def _numbered(file: Path) -> dict[int, str]:
    return dict(enumerate(line.strip() for line in read_text(file).splitlines() if line.strip()))


def _checked(names: _Names) -> _Names:
    if not names.by_id:
        raise DataError(f"{names.source}: lists no category names; there is nothing to learn")
    return names


def _from_folders(place: Path, images: Path | None) -> dict[str, Annotations]:
    """Label folders next to a list of names: images and labels in separate folders or together."""
    listed = _names_in(place)
    assert listed is not None
    names = _checked(_Names(listed, _numbered(listed)))
    if images is not None:
        labels = place / "labels" if (place / "labels").is_dir() else place
        table = Table(place, Path(images))
        _add_labels(table, names, labels, Path(images))
        return _finish({ALL: table}, names, None)
    folders = {}
    if (place / "images").is_dir():
        folders = split_folders(place / "images") or {ALL: place / "images"}
    folders = folders or split_folders(place) or {ALL: place}
    tables = {}
    for split, folder in folders.items():
        tables[split] = Table(place, place)
        _add_images(tables[split], names, _listed(folder), None)
    return _finish(tables, names, None)


def _add_labels(table: Table, names: _Names, labels: Path, images: Path) -> None:
    """Add the images with label files, from a folder that may have others too."""
    if not images.is_dir():
        raise DataError(f"no image folder {images}; name the folder that holds the images")
    files = {path.stem: path for path in image_files(images)}
    texts = sorted(path for path in labels.glob("*.txt") if path.name not in _NAME_FILES)
    missing = [path.name for path in texts if path.stem not in files]
    if missing:
        raise DataError(
            f"{labels}: {len(missing)} of {len(texts)} label files have no image in {images}: "
            f"{some(missing)}"
        )
    for text in texts:
        _add_image(table, names, files[text.stem], text)


def _add_images(table: Table, names: _Names, files: Iterable[Path], images: Path | None) -> None:
    for file in files:
        image = file if images is None else Path(images) / file.name
        if image in table.files:
            table.note("images named twice, taken once")
            continue
        _add_image(table, names, image, _label_file(file))


def _label_file(image: Path) -> Path:
    """The label file of an image: `labels` for the last `images` in its path, or next to it."""
    parts = list(image.parts)
    for row in range(len(parts) - 2, -1, -1):
        if parts[row] == "images":
            path = Path(*parts[:row], "labels", *parts[row + 1 :]).with_suffix(".txt")
            if path.is_file() or not image.with_suffix(".txt").is_file():
                return path
            break
    return image.with_suffix(".txt")


def _add_image(table: Table, names: _Names, file: Path, labels: Path) -> None:
    image, height, width = table.image(file)
    if not labels.is_file():
        table.note("images have no label file: taken as images without objects")
        return
    seen: set[tuple[str, ...]] = set()
    for number, line in enumerate(read_text(labels).splitlines(), start=1):
        words = tuple(line.split())
        if not words:
            continue
        if words in seen and not (table.folder / KEPT_IDS).is_file():
            table.note("rows given twice left out")
            continue
        seen.add(words)
        where = f"{labels} line {number}"
        label = _label(words[0], names, where)
        low, high = _corners(words[1:], names, where, table)
        table.box(
            image, label, (low[0] * width, low[1] * height), (high[0] * width, high[1] * height)
        )


def _label(word: str, names: _Names, where: str) -> str:
    if word in names.by_id.values():
        return word
    try:
        number = float(word)
    except ValueError:
        number = -1
    if number not in names.by_id:
        ids = sorted(names.by_id)
        whole = len(ids) == ids[-1] - ids[0] + 1
        which = f"from {ids[0]} to {ids[-1]}" if whole else some(ids, 10)
        raise DataError(
            f"{where}: class {shown(word)} is not among the {len(ids)} names of {names.source} "
            f"(numbers {which})"
        )
    return names.by_id[int(number)]


def _corners(
    words: Sequence[str], names: _Names, where: str, table: Table
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Corners of a row's box, as fractions of the image."""
    if names.keypoints and len(words) > 4:
        words = words[:4]
        table.note("rows with key points, which are left out")
    if len(words) == 5:
        raise DataError(
            f"{where}: a class and five numbers look like a detection with its confidence; "
            f"expected labels (class, x, y, width, height)"
        )
    if len(words) != 4 and (len(words) < 6 or len(words) % 2):
        raise DataError(
            f"{where}: expected a class and 4 numbers (x, y, width, height), or pairs x y of a "
            f"polygon, found {len(words)} numbers"
        )
    values = [to_number(word, where) for word in words]
    if max(map(abs, values)) > _LARGEST_FRACTION:
        raise DataError(
            f"{where}: expected fractions of the image between 0 and 1, found "
            f"{max(values, key=abs):g} (pixels are not normalised)"
        )
    if len(values) == 4:
        x, y, width, height = values
        return (x - width / 2, y - height / 2), (x + width / 2, y + height / 2)
    table.note("polygons or rotated boxes became their enclosing boxes")
    return (min(values[::2]), min(values[1::2])), (max(values[::2]), max(values[1::2]))


def _finish(tables: Mapping[str, Table], names: _Names, count: Any) -> dict[str, Annotations]:
    categories = [Category(number, name) for number, name in sorted(names.by_id.items())]
    if len(set(names.by_id.values())) < len(categories):
        raise DataError(f"{names.source}: two categories have the same name; names must differ")
    if count is not None and str(count) != str(len(categories)):
        next(iter(tables.values())).note(
            f"names in {names.source.name}, where it says there are {count}", len(categories)
        )
    return finish(tables, categories)
