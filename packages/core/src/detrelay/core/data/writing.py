"""Write annotated images as COCO, YOLO, VOC or parquet, with copies of the images."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.kept_ids import write_ids
from detrelay.core.data.readers.table import ALL, TRAIN
from detrelay.core.errors import DataError, unknown_name

# Readers interpret a fraction beyond this as pixels.
_LARGEST_FRACTION = 1.5

Splits = Mapping[str, tuple[Annotations, list[str]]]


def write_data(splits: Mapping[str, Annotations], format_name: str, folder: Path) -> list[str]:
    """Write splits in a format.

    Args:
        splits: as returned by readers, with the same categories.
        format_name: "coco", "yolo", "voc" or "parquet".
        folder: the destination; must be empty or new.

    Returns:
        What the format cannot represent, and what was changed for it, a sentence each.

    Raises:
        DataError: the format is unknown, the folder is not empty, or an image is missing.
    """
    if format_name not in WRITERS:
        raise DataError(unknown_name("format to write", format_name, WRITERS))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not empty; name a new folder")
    notes: list[str] = []
    named: dict[str, tuple[Annotations, list[str]]] = {}
    for split, part in splits.items():
        if split == ALL:
            split = TRAIN
            notes.append("the images have no splits: written as the split train")
        missing = part.images.missing()
        if missing:
            raise DataError(f"{len(missing)} images of {part.source} are missing: {missing[0]}")
        if format_name in ("yolo", "voc") and part.crowd.any():
            notes.append(
                f"{int(part.crowd.sum())} crowd boxes of {split} left out: {format_name} cannot "
                f"mark them"
            )
            part = part.with_boxes(~part.crowd)
        named[split] = (part, _names(part, notes))
    folder.mkdir(parents=True, exist_ok=True)
    notes += WRITERS[format_name](named, folder)
    if format_name != "coco":
        write_ids(folder, named)
    return notes


def _names(part: Annotations, notes: list[str]) -> list[str]:
    """A file name without folders for each image, with a unique stem."""
    names = [Path(part.images.name(row)).name for row in range(len(part))]
    stems = Counter(Path(name).stem.casefold() for name in names)
    changed = 0
    for row, name in enumerate(names):
        if stems[Path(name).stem.casefold()] > 1:
            names[row] = f"{Path(name).stem}_{part.image_ids[row]}{Path(name).suffix}"
            changed += 1
    if changed:
        notes.append(f"{changed} images share their name with another: their id was added to it")
    return names


def _copy(part: Annotations, names: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, name in enumerate(names):
        (folder / name).write_bytes(_content(part, row))


def _content(part: Annotations, row: int) -> bytes:
    file = part.images.open(row)
    return file.getvalue() if isinstance(file, BytesIO) else file.read_bytes()


def _write_coco(splits: Splits, folder: Path) -> list[str]:
    for split, (part, names) in splits.items():
        _copy(part, names, folder / "images" / split)
        content = part.to_coco()
        for entry, name in zip(content["images"], names, strict=True):
            entry["file_name"] = f"{split}/{name}"
        (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return []


def _write_yolo(splits: Splits, folder: Path) -> list[str]:
    content: dict[str, Any] = {"path": "."}
    notes: list[str] = []
    for split, (part, names) in splits.items():
        content[split] = f"images/{split}"
        content["names"] = {row: category.name for row, category in enumerate(part.categories)}
        _copy(part, names, folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        sides = part.sizes[part.box_image][:, ::-1].astype(np.float64)
        low, size = part.boxes_xywh[:, :2], part.boxes_xywh[:, 2:]
        rows = np.concatenate([(low + size / 2) / sides, size / sides], axis=1)
        far = (np.abs(rows) > _LARGEST_FRACTION).any(1)
        if far.any():
            clipped = np.clip(low, 0, sides), np.clip(low + size, 0, sides)
            inside = np.concatenate(
                [sum(clipped) / 2 / sides, (clipped[1] - clipped[0]) / sides], 1
            )
            rows[far] = inside[far]
            notes.append(f"{int(far.sum())} boxes of {split} far outside are cut to their image")
        lines: list[list[str]] = [[] for _ in names]
        for image, label, numbers in zip(
            part.box_image.tolist(), part.box_class.tolist(), rows.tolist(), strict=True
        ):
            lines[image].append(" ".join([str(label), *map(repr, numbers)]))
        for name, text in zip(names, lines, strict=True):
            (folder / "labels" / split / name).with_suffix(".txt").write_text("\n".join(text))
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return notes


def _write_voc(splits: Splits, folder: Path) -> list[str]:
    stems: Counter[str] = Counter()
    for split, (part, names) in splits.items():
        stems.update(Path(name).stem for name in names)
        _copy(part, names, folder / "JPEGImages")
        (folder / "Annotations").mkdir(exist_ok=True)
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        listed = "\n".join(Path(name).stem for name in names)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(listed, encoding="utf-8")
        order = np.argsort(part.box_image, kind="stable")
        ends = np.searchsorted(part.box_image[order], np.arange(len(part) + 1))
        for row, name in enumerate(names):
            tree = _voc_file(part, row, name, order[ends[row] : ends[row + 1]])
            file = (folder / "Annotations" / name).with_suffix(".xml")
            ElementTree.ElementTree(tree).write(file, encoding="utf-8")
    if max(stems.values(), default=0) > 1:
        shutil.rmtree(folder)
        raise DataError("two splits have images of the same name, which VOC keeps in one folder")
    return []


def _voc_file(
    part: Annotations, row: int, name: str, boxes: np.ndarray[Any, np.dtype[np.int64]]
) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    height, width = part.sizes[row].tolist()
    for key, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for box in boxes:
        entry = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(entry, "name").text = part.categories[part.box_class[box]].name
        ElementTree.SubElement(entry, "difficult").text = "0"
        corners = ElementTree.SubElement(entry, "bndbox")
        x, y, w, h = part.boxes_xywh[box].tolist()
        for key, number in (("xmin", x), ("ymin", y), ("xmax", x + w), ("ymax", y + h)):
            ElementTree.SubElement(corners, key).text = f"{number:.12g}"
    return root


def _write_parquet(splits: Splits, folder: Path) -> list[str]:
    import datasets

    datasets.utils.logging.disable_progress_bar()
    (folder / "data").mkdir()
    for split, (part, names) in splits.items():
        objects = {
            "id": datasets.List(datasets.Value("int64")),
            "area": datasets.List(datasets.Value("float64")),
            "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
            "category": datasets.List(
                datasets.ClassLabel(names=[category.name for category in part.categories])
            ),
            "iscrowd": datasets.List(datasets.Value("bool")),
        }
        features = datasets.Features(
            {
                "image_id": datasets.Value("int64"),
                "image": datasets.Image(),
                "width": datasets.Value("int64"),
                "height": datasets.Value("int64"),
                "objects": objects,
            }
        )
        with tempfile.TemporaryDirectory() as cache:
            data = datasets.Dataset.from_generator(
                _rows,
                features,
                cache_dir=cache,
                # a list would be interpreted as shards, each passed on its own
                gen_kwargs={"part": part, "names": tuple(names)},
            )
            title = {"val": "validation"}.get(split, split)
            data.to_parquet(folder / "data" / f"{title}-00000-of-00001.parquet")
    return []


def _rows(part: Annotations, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    order = np.argsort(part.box_image, kind="stable")
    ends = np.searchsorted(part.box_image[order], np.arange(len(part) + 1))
    for row, name in enumerate(names):
        boxes = order[ends[row] : ends[row + 1]]
        height, width = part.sizes[row].tolist()
        yield {
            "image_id": int(part.image_ids[row]),
            "image": {"bytes": _content(part, row), "path": name},
            "width": width,
            "height": height,
            "objects": {
                "id": part.box_ids[boxes].tolist(),
                "area": part.areas[boxes].tolist(),
                "bbox": part.boxes_xywh[boxes].tolist(),
                "category": part.box_class[boxes].tolist(),
                "iscrowd": part.crowd[boxes].tolist(),
            },
        }


WRITERS: Mapping[str, Callable[[Splits, Path], list[str]]] = {
    "coco": _write_coco,
    "yolo": _write_yolo,
    "voc": _write_voc,
    "parquet": _write_parquet,
}
