"""Folders of COCO json: `train.json` and `val.json`, COCO's own layout, and Roboflow's."""

from __future__ import annotations

from pathlib import Path

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.formats import SUFFIXES
from detrelay.core.data.kept_ids import FILE as KEPT_IDS
from detrelay.core.data.readers import coco
from detrelay.core.data.readers.table import ALL, TEST, TRAIN, VAL, split_folders, split_name

_ROBOFLOW = "_annotations.coco.json"
_START = 1 << 16


def recognises(place: Path) -> bool:
    """Whether a place is a COCO json, or a folder with such files in a known layout."""
    if place.is_file():
        return place.suffix.lower() == ".json" and _is_coco(place)
    return bool(_files(place))


def read(
    place: Path, images: Path | None = None, *, allow_outside: bool = False
) -> dict[str, Annotations]:
    """The splits of a COCO folder, or the one of a file.

    Args:
        place: a json file, or a folder.
        images: folder that `file_name` is relative to; None for that of the layout.
        allow_outside: let a `file_name` point outside it.

    Raises:
        DataError: see `detrelay.core.data.readers.coco.read`.
    """
    if not place.is_dir():
        return {ALL: coco.read(place, images, allow_outside=allow_outside)}
    return {
        split: coco.read(file, images or folder, allow_outside=allow_outside)
        for split, (file, folder) in _files(place).items()
    }


def _is_coco(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(_START).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):  # a list of detections is rejected with a better message later
        return b'"data"' not in start
    return b'"shapes"' not in start or b'"categories"' in start


def _files(place: Path) -> dict[str, tuple[Path, Path | None]]:
    """The file of each split, and the folder of its images."""
    found: dict[str, tuple[Path, Path | None]] = {}
    for split, folder in split_folders(place).items():
        if (folder / _ROBOFLOW).is_file():
            found[split] = (folder / _ROBOFLOW, folder)
    if not found and (place / _ROBOFLOW).is_file():
        found[ALL] = (place / _ROBOFLOW, place)
    if found:
        return found
    for split, names in ((TRAIN, ("train",)), (VAL, ("val", "valid")), (TEST, ("test",))):
        for name in names:
            if (place / f"{name}.json").is_file():
                found.setdefault(split, (place / f"{name}.json", None))
    if TRAIN in found:
        return found
    found = {}
    for file in sorted((place / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        named = split_name(name.rstrip("0123456789"))
        if named is not None:
            found.setdefault(named, (file, _folder(place, name, named)))
    if found:
        return {split: found[split] for split in (TRAIN, VAL, TEST) if split in found}
    files = [file for file in sorted(place.glob("*.json")) if _looks_like_truth(file)]
    return {ALL: (files[0], None)} if len(files) == 1 else {}


def _folder(place: Path, name: str, split: str) -> Path:
    """Where the images of `annotations/instances_NAME.json` are."""
    for folder in (place / name, place / "images" / name, place / "images" / split):
        if folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            return folder
    return place / "images" if (place / "images").is_dir() else place


def _looks_like_truth(file: Path) -> bool:
    """Whether a json begins or ends like a COCO file; its lists may come in any order."""
    if file.name == KEPT_IDS or not file.is_file():
        return False
    with file.open("rb") as stream:
        start = stream.read(_START).lstrip()
        stream.seek(max(0, file.stat().st_size - _START))
        ends = start + stream.read()
    return (
        start.startswith(b"{")
        and any(key in ends for key in (b'"images"', b'"annotations"', b'"categories"'))
        and b'"shapes"' not in ends
    )
