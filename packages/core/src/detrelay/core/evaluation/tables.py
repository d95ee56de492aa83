"""Objects and detections of a dataset as numpy columns: no Python object per box.

Nothing here needs torch, so that files can be scored where only numpy is installed.
"""

from __future__ import annotations

import json
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrelay.core.errors import DataError, one_line
from detrelay.core.plain_file import refuse_endless

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_KEYS = ("image_id", "category_id", "bbox", "score")


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """A detector's output on any number of images; about 64 bytes per detection.

    Attributes:
        image_ids: int64 [N], the dataset's ids.
        category_ids: int64 [N], the dataset's ids.
        boxes_xywh: float64 [N, 4], left, top, width, height in pixels of the original image.
        scores: float64 [N], finite.
    """

    image_ids: Ints
    category_ids: Ints
    boxes_xywh: Floats
    scores: Floats

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Detections:
        """Columns of rows in COCO's results format.

        Raises:
            DataError: a row lacks a key, or has anything but integer ids and finite numbers.
        """
        columns = _Columns()
        for number, row in enumerate(rows):
            columns.add(number, row)
        return columns.finish()

    @classmethod
    def from_results(
        cls,
        results: Iterable[Mapping[str, Any]],
        image_ids: Sequence[int],
        category_ids: Sequence[int],
    ) -> Detections:
        """Columns of post-processed outputs.

        Args:
            results: one mapping per image with `scores` [n], `labels` [n] and `boxes` [n, 4] xyxy
                in pixels of the original image; arrays, or tensors on the CPU.
            image_ids: original image id of each result.
            category_ids: original category id by class index.

        Raises:
            DataError: a label has no category.
            ValueError: there are not as many results as image ids.
        """
        ids = np.asarray(category_ids, dtype=np.int64)
        parts = []
        for result, image_id in zip(results, image_ids, strict=True):
            boxes, labels = np.asarray(result["boxes"]), np.asarray(result["labels"])
            if labels.size and labels.max() >= len(ids):
                raise DataError(
                    f"the model found class index {labels.max()} in image {image_id}, but the data "
                    f"set has {len(ids)} categories (indices from 0)"
                )
            corner, far = boxes.reshape(-1, 4)[:, :2], boxes.reshape(-1, 4)[:, 2:]
            parts.append(
                cls(
                    np.full(len(labels), image_id, dtype=np.int64),
                    ids[labels.astype(np.int64)],
                    np.concatenate([corner, far - corner], axis=1).astype(np.float64),
                    np.asarray(result["scores"]).astype(np.float64),
                )
            )
        return cls.concatenate(parts)

    @classmethod
    def concatenate(cls, parts: Sequence[Detections]) -> Detections:
        """All detections of some parts, in order."""
        if not parts:
            return _Columns().finish()
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.category_ids for part in parts]),
            np.concatenate([part.boxes_xywh for part in parts]),
            np.concatenate([part.scores for part in parts]),
        )

    def select(self, keep: Bools | Ints) -> Detections:
        """The detections that a mask or a list of positions selects."""
        return Detections(
            self.image_ids[keep], self.category_ids[keep], self.boxes_xywh[keep], self.scores[keep]
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows in COCO's results format, one after the other."""
        for number in range(len(self)):
            yield {
                "image_id": int(self.image_ids[number]),
                "category_id": int(self.category_ids[number]),
                "bbox": self.boxes_xywh[number].tolist(),
                "score": float(self.scores[number]),
            }

    def write(self, path: Path) -> None:
        """Write a COCO results list; only one row at a time is held as Python objects."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for number, row in enumerate(self.rows()):
                file.write(("[\n" if number == 0 else ",\n") + json.dumps(row))
            file.write("\n]\n" if len(self) else "[]\n")


def read_detections(path: Path, id_of_file: Mapping[str, int] | None = None) -> Detections:
    """The detections in a COCO results list, from any detector.

    Args:
        path: the json file.
        id_of_file: from `ids_of_files`, for rows that have `file_name` instead of `image_id`; rows
            that have both must agree with it.

    Raises:
        DataError: the file cannot be read, it is not a list of detections, or it was written for
            other image ids.
    """
    columns = _Columns()
    expected = "expected a list of objects with image_id, category_id, bbox and score"

    def take(entry: dict[str, Any]) -> dict[str, Any] | None:
        # rows become columns while they are read; an object that lacks a key (a mask, say) is kept
        if id_of_file is not None and "file_name" in entry:
            entry["image_id"] = _id_of(len(columns), entry, id_of_file)
        if any(key not in entry for key in _KEYS):
            return entry
        columns.add(len(columns), entry)
        return None

    try:
        refuse_endless(path)
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=take)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not json ({one_line(error)})") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: not a COCO results list; {expected}")
    for number, entry in enumerate(content):
        if isinstance(entry, dict):
            missing = next(key for key in _KEYS if key not in entry)
            raise DataError(f"{path}: detection {number} has no {missing!r}; {expected}")
        if entry is not None:
            raise DataError(
                f"{path}: entry {number} is a {type(entry).__name__}, not a detection; {expected}"
            )
    if len(content) != len(columns):
        raise DataError(
            f"{path}: holds {len(columns)} detections, but {len(content)} entries (null, or "
            f"detections inside of others); {expected}"
        )
    return columns.finish()


def ids_of_files(content: Mapping[str, Any]) -> dict[str, int]:
    """Image id by `file_name`, and by its last part, each if only one image has it.

    Args:
        content: a COCO dict; images without `file_name` are left out.
    """
    named = [entry for entry in content["images"] if entry.get("file_name")]
    result: dict[str, int] = {}
    for shorten in (_last_part, _plain):
        names = [shorten(entry["file_name"]) for entry in named]
        counts = Counter(names)
        result |= {
            name: entry["id"] for name, entry in zip(names, named, strict=True) if counts[name] == 1
        }
    return result


def _plain(name: str) -> str:
    """A file name with forward slashes and without `./`."""
    return posixpath.normpath(name.replace("\\", "/"))


def _last_part(name: str) -> str:
    return posixpath.basename(_plain(name))


def _id_of(number: int, entry: Mapping[str, Any], id_of_file: Mapping[str, int]) -> Any:
    """The image id of a row with a file name: its own, or the file's."""
    name = str(entry["file_name"])
    named = id_of_file.get(_plain(name), id_of_file.get(_last_part(name)))
    if "image_id" not in entry:
        if named is None:
            raise DataError(
                f"detection {number} names no image_id, and its file_name {name!r} is that of no "
                f"or of several images of the ground truth"
            )
        return named
    if named is not None and named != entry["image_id"]:
        raise DataError(
            f"detection {number} says image_id {entry['image_id']!r} and file_name {name!r}, which "
            f"is image {named} in the ground truth: its image ids are of another file; without "
            f"image_id it would be matched by file_name"
        )
    return entry["image_id"]


class _Columns:
    """Columns that grow by a row at a time, in machine numbers."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.numbers = array("d")

    def __len__(self) -> int:
        return len(self.ids) // 2

    def add(self, number: int, row: Mapping[str, Any]) -> None:
        for key in _KEYS:
            if key not in row:
                raise DataError(f"detection {number} has no {key!r}")
        for key in ("image_id", "category_id"):
            value = row[key]
            if not isinstance(value, int) or isinstance(value, bool):
                raise DataError(
                    f"{key} of detection {number} must be a whole number, found {value!r}"
                )
            if abs(value) >= 2**63:
                raise DataError(f"{key} of detection {number} does not fit 64 bits: {value}")
        box, score = row["bbox"], row["score"]
        if not (
            isinstance(box, list | tuple)
            and len(box) == 4
            and all(map(_is_finite, box))
            and all(float(side) >= 0 for side in box[2:])
        ):
            raise DataError(
                f"bbox of detection {number} must be four finite numbers [x, y, width, height] "
                f"with width and height of at least 0, found {box!r}"
            )
        if not _is_finite(score):
            raise DataError(f"score of detection {number} must be a finite number, found {score!r}")
        self.ids.extend((int(row["image_id"]), int(row["category_id"])))
        self.numbers.extend((*map(float, box), float(score)))

    def finish(self) -> Detections:
        ids = np.array(self.ids, dtype=np.int64).reshape(-1, 2)
        numbers = np.array(self.numbers, dtype=np.float64).reshape(-1, 5)
        return Detections(
            ids[:, 0].copy(), ids[:, 1].copy(), numbers[:, :4].copy(), numbers[:, 4].copy()
        )


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """The objects of a dataset.

    Attributes:
        image_ids: int64 [I], sorted, unique.
        category_ids: int64 [K], sorted, unique.
        names: K names, all different.
        image: int64 [G], position of each object's image in `image_ids`.
        category: int64 [G], position of each object's category in `category_ids`.
        boxes_xywh: float64 [G, 4], left, top, width, height, pixels.
        areas: float64 [G], pixels; of the object's outline if the file has it.
        crowd: bool [G], whether the box surrounds a crowd, which need not be found.
    """

    image_ids: Ints
    category_ids: Ints
    names: tuple[str, ...]
    image: Ints
    category: Ints
    boxes_xywh: Floats
    areas: Floats
    crowd: Bools

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def from_coco(cls, content: Mapping[str, Any]) -> GroundTruth:
        """Columns of a COCO dict with `images`, `annotations` and `categories`.

        Raises:
            DataError: two categories share a name.
        """
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        if len(set(names.values())) < len(names):
            raise DataError("two categories of the ground truth share a name; names must differ")
        category_ids = np.array(sorted(names), dtype=np.int64)
        image_ids = np.unique(np.array([entry["id"] for entry in content["images"]], np.int64))
        rows = content["annotations"]
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        areas = [row.get("area", row["bbox"][2] * row["bbox"][3]) for row in rows]
        images = np.array([row["image_id"] for row in rows], dtype=np.int64)
        categories = np.array([row["category_id"] for row in rows], dtype=np.int64)
        for key, ids, known in (
            ("image_id", images, image_ids),
            ("category_id", categories, category_ids),
        ):
            strange = ~np.isin(ids, known)
            if strange.any():
                raise DataError(
                    f"annotation {int(np.flatnonzero(strange)[0])} of the ground truth names {key} "
                    f"{ids[strange][0]}, which it does not list"
                )
        return cls(
            image_ids=image_ids,
            category_ids=category_ids,
            names=tuple(names[category] for category in category_ids.tolist()),
            image=np.searchsorted(image_ids, images),
            category=np.searchsorted(category_ids, categories),
            boxes_xywh=boxes,
            areas=np.array(areas, dtype=np.float64),
            crowd=np.array([row.get("iscrowd", 0) for row in rows], dtype=np.bool_),
        )

    def class_agnostic(self) -> GroundTruth:
        """A copy in which every object has the one category "object", id 1."""
        return replace(
            self,
            category_ids=np.ones(1, np.int64),
            names=("object",),
            category=np.zeros_like(self.category),
        )

    def place(self, detections: Detections) -> Found:
        """The detections with positions instead of ids.

        Raises:
            DataError: a detection names an image or a category that is not listed.
        """
        columns = (
            ("image_id", detections.image_ids, self.image_ids),
            ("category_id", detections.category_ids, self.category_ids),
        )
        places = []
        for key, values, known in columns:
            place = np.searchsorted(known, values).clip(max=max(0, len(known) - 1))
            strange = known[place] != values if len(known) else np.ones(len(values), np.bool_)
            if strange.any():
                number = int(np.flatnonzero(strange)[0])
                raise DataError(
                    f"detection {number} names {key} {values[number]}, which the ground truth does "
                    f"not list"
                )
            places.append(place)
        return Found(places[0], places[1], detections.boxes_xywh, detections.scores)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Detections whose images and categories are positions in a `GroundTruth`.

    Attributes:
        image: int64 [N].
        category: int64 [N].
        boxes_xywh: float64 [N, 4], pixels.
        scores: float64 [N].
    """

    image: Ints
    category: Ints
    boxes_xywh: Floats
    scores: Floats

    def __len__(self) -> int:
        return len(self.scores)

    def class_agnostic(self) -> Found:
        """A copy in which every detection has the one category "object"."""
        return replace(self, category=np.zeros_like(self.category))

    def select(self, keep: Bools | Ints) -> Found:
        """The detections that a mask or a list of positions selects."""
        return Found(
            self.image[keep], self.category[keep], self.boxes_xywh[keep], self.scores[keep]
        )

    def ranked(self, limit: int, *, by_category: bool = True) -> Found:
        """The best of each image, or of each category in each image: all that the figures use.

        Ordered by image, then category, then descending score; equal scores keep their order.
        """
        first = self.category if by_category else np.zeros_like(self.category)
        order = np.lexsort((-self.scores, first, self.image))
        same = (np.diff(self.image[order]) == 0) & (np.diff(first[order]) == 0)
        starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(self) else np.zeros(0, int)
        rank = np.arange(len(self)) - np.repeat(starts, np.diff([*starts, len(self)]))
        return self.select(order[rank < limit])


def box_iou(found: Floats, truth: Floats, crowd: Bools | None = None) -> Floats:
    """Overlap of two lists of boxes xywh, computed in the order of pycocotools.

    Args:
        found: [N, 4].
        truth: [G, 4].
        crowd: [G], objects for which the union is the detected box alone.

    Returns:
        [N, G]; 0 where both boxes have no area.
    """
    left, top, width, height = (found[:, None, side] for side in range(4))
    x, y, w, h = (truth[None, :, side] for side in range(4))
    across = np.minimum(left + width, x + w) - np.maximum(left, x)
    down = np.minimum(top + height, y + h) - np.maximum(top, y)
    overlap = np.maximum(across, 0.0) * np.maximum(down, 0.0)
    union: Floats = width * height + w * h - overlap
    if crowd is not None:
        union = np.where(crowd[None, :], width * height, union)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _is_finite(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
