"""Pascal VOC: an XML file for each image, with corners in pixels.

Corners are taken as the edges of the box, as LabelImg and most tools write them. VOC's own files
count pixels from 1 and include the last one, which no file says: `voc_devkit` reads those.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.readers.table import (
    ALL,
    TEST,
    TRAIN,
    Table,
    finish,
    images_by,
    read_text,
    read_xml,
    split_folders,
    split_name,
    to_number,
)
from detrelay.core.data.sample import some
from detrelay.core.errors import DataError

_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", ".")


def recognises(place: Path) -> bool:
    """Whether a place is one of VOC's XML files, or a folder with some."""
    if not place.is_dir():
        return place.suffix.lower() == ".xml" and _is_voc(place)
    folders = [_xml_folder(place), *map(_xml_folder, split_folders(place).values())]
    for folder in folders:
        first = next(iter(sorted(folder.glob("*.xml"))), None)
        if first is not None and first.is_file():
            return _is_voc(first)
    return False


def _is_voc(file: Path) -> bool:
    if not file.is_file():  # a pipe would be waited for
        return False
    with file.open("rb") as stream:
        return b"<annotation>" in stream.read(4096).replace(b"\0", b"")


def read(
    place: Path, images: Path | None = None, *, first_pixel: int = 0
) -> dict[str, Annotations]:
    """The splits of a VOC folder: lists in `ImageSets/Main`, or folders named like splits.

    Args:
        place: folder with `Annotations`, or with XML files beside the images; or one file.
        images: folder of the images; None looks for `JPEGImages`, `images` and beside the XML.
        first_pixel: number of the first pixel; with 1 the lower right corner is in the box.

    Raises:
        DataError: a file cannot be read or used; the message names it.
    """
    if place.is_file():
        folder = place.parent
        root = folder.parent if folder.name == "Annotations" else folder
        return finish({ALL: _table(root, [place], images, first_pixel, alone=True)})
    tables = {}
    lists = _lists(place)
    if lists:
        folder = _xml_folder(place)
        listed: set[str] = set()
        withheld = 0
        for split, names in lists.items():
            files = [folder / f"{name}.xml" for name in names]
            missing = [path.name for path in files if not path.is_file()]
            if split == TEST and len(missing) == len(files) and len(lists) > 1:
                withheld = len(missing)  # VOC 2012 comes without annotations of its test images
                continue
            if missing:
                raise DataError(
                    f"{place}: {len(missing)} of {len(files)} entries of the list {split} have no "
                    f"XML file in {folder}: {some(missing)}"
                )
            tables[split] = _table(place, files, images, first_pixel)
            listed.update(names)
        if withheld:
            first = next(iter(tables.values()))
            first.note(
                "entries of the list test, none of which has an XML file, left out", withheld
            )
        others = sum(path.stem not in listed for path in folder.glob("*.xml"))
        if others:
            next(iter(tables.values())).note("XML files are in no list and left out", others)
    else:
        folders = {ALL: place}
        if not any(_xml_folder(place).glob("*.xml")):
            folders = split_folders(place)
        for split, folder in folders.items():
            tables[split] = _table(
                folder, sorted(_xml_folder(folder).glob("*.xml")), images, first_pixel
            )
    return finish(tables)


read_devkit = partial(read, first_pixel=1)


def _xml_folder(place: Path) -> Path:
    return place / "Annotations" if (place / "Annotations").is_dir() else place


def _lists(place: Path) -> dict[str, list[str]]:
    """The names of each split."""
    folder = place / "ImageSets" / "Main"
    if not folder.is_dir():
        folder = place / "ImageSets"
    if not folder.is_dir():
        return {}
    files = {file.stem: file for file in sorted(folder.glob("*.txt"))}
    found = {split: file for name, file in files.items() if (split := split_name(name))}
    if not found and len(files) == 1:
        found = {ALL: next(iter(files.values()))}
    elif TRAIN not in found and "trainval" in files:
        found = {TRAIN: files["trainval"], **found}
    return {split: _stems(read_text(file).splitlines()) for split, file in found.items()}


def _stems(lines: Iterable[str]) -> list[str]:
    """Names in a list, without the extension and the flag of some; they may contain spaces."""
    stems = []
    for line in lines:
        name = line.strip()
        head, _, flag = name.rpartition(" ")
        if head and flag in ("0", "1", "-1"):
            name = head.strip()
        if name:
            stems.append(Path(name).stem if Path(name).suffix in (".xml", ".jpg", ".png") else name)
    return list(dict.fromkeys(stems))


def _table(
    place: Path, files: list[Path], images: Path | None, first_pixel: int, *, alone: bool = False
) -> Table:
    if images is not None and not Path(images).is_dir():
        raise DataError(f"no image folder {images}; name the folder that holds the images")
    folders = [Path(images)] if images is not None else [place / name for name in _IMAGE_FOLDERS]
    folders = [folder for folder in folders if folder.is_dir()]
    found = images_by("stem", folders)
    missing = [path.stem for path in files if path.stem not in found]
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(files)} XML files have no image of their name in "
            f"{some(list(map(str, folders)))}: {some(missing)}; name the folder of the images"
        )
    table = Table(place, folders[0] if images is not None else place)
    for file in files:
        _add_file(table, file, found[file.stem], first_pixel)
    bare = len(set(found) - {path.stem for path in files})
    if bare and images is None and not alone and not _lists(place):
        table.note("images have no XML file and are left out", bare)
    return table


def _add_file(table: Table, file: Path, path: Path, first_pixel: int) -> None:
    root = read_xml(file)
    if root.tag != "annotation":
        raise DataError(f"{file}: expected VOC's <annotation>, found <{root.tag}>")
    named = Path(_text(root, "filename").replace("\\", "/")).name
    if named and Path(named).stem != path.stem and named != path.stem:
        table.note("XML files name another image; the one of their own name is taken")
    size: tuple[int, int] | None = None
    width, height = _text(root, "size/width"), _text(root, "size/height")
    if width and height:
        numbers = (to_number(height, f"{file} height"), to_number(width, f"{file} width"))
        size = (int(numbers[0]), int(numbers[1])) if min(numbers) > 0 else None
    if size is None:
        table.note("XML files give no size; it is taken from the image")
    image, *_ = table.image(path, size)
    for number, entry in enumerate(root.iter("object"), start=1):
        where = f"{file} object {number}"
        label = _text(entry, "name")
        if not label:
            raise DataError(f"{where}: has no <name>")
        if entry.find("bndbox") is None:
            table.note("objects without a box left out")
            continue
        corners = [
            to_number(_text(entry, f"bndbox/{key}"), f"{where} <{key}>")
            for key in ("xmin", "ymin", "xmax", "ymax")
        ]
        low = [value - first_pixel for value in corners[:2]]
        table.box(image, label, low, corners[2:])
        if _text(entry, "difficult") == "1":
            table.note("boxes are marked difficult and kept as any other")


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
