"""Check annotations for defects: counts and examples by split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detrelay.core.data.annotations import Annotations

# COCO's borders between small, medium and large objects: areas in pixels.
_AREAS = (32**2, 96**2)
_TINY_SIDE = 4.0
# Pixels by which a box at a border may exceed it: YOLO's fractions are rounded.
_ROUNDING = 0.1
# COCO's evaluation counts at most this many detections per image and category.
_MAX_BOXES = 100
_DOUBLED_IOU = 0.9
# One category with more of the boxes than this outweighs the others in training.
_MOSTLY = 0.8
# If nearly all images show some category, they are of one kind of scene, and in an image without a
# category that most others show its boxes may have been forgotten; likewise in one with few boxes
# of a crowd.
_NEARLY_ALL, _MOST = 0.9, 0.5
_CROWD, _FEW = 8, 1 / 3
_FEWEST_IMAGES = 10
_FREQUENT_SIZES = 5


@dataclass(slots=True)
class Defect:
    """A kind of fault.

    Attributes:
        what: what is wrong, in words that follow a number.
        count: how often.
        examples: all of them, or where they are; printed output shows the first few.
        blocks: training or evaluation would fail on it.
    """

    what: str
    count: int
    examples: list[str] = field(default_factory=list)
    blocks: bool = False


@dataclass(slots=True)
class SplitCheck:
    """The content of a split, and its defects.

    Attributes:
        images: number of images.
        boxes: number of boxes, including crowds.
        crowd_boxes: those around crowds.
        images_without_boxes: images without boxes.
        boxes_per_category: by name.
        boxes_by_size: small, medium and large as COCO counts, by area.
        boxes_per_image: smallest, median, mean and largest number.
        image_sizes: the most frequent, `WIDTHxHEIGHT`, with their numbers.
        aspect: 1st, 50th and 99th percentile of width over height of boxes.
        defects: by kind.
        notes: the reader's remarks.
    """

    images: int
    boxes: int
    crowd_boxes: int
    images_without_boxes: int
    boxes_per_category: dict[str, int]
    boxes_by_size: dict[str, int]
    boxes_per_image: dict[str, float]
    image_sizes: dict[str, int]
    aspect: list[float]
    defects: list[Defect]
    notes: list[str]


def check_split(part: Annotations) -> SplitCheck:
    """Check the annotations of a split; images are not opened."""
    counts = np.bincount(part.box_image, minlength=len(part))
    classes = np.bincount(part.box_class, minlength=len(part.categories)).tolist()
    small, medium = (int((part.areas < border).sum()) for border in _AREAS)
    sizes, times = np.unique(part.sizes, axis=0, return_counts=True)
    frequent = np.argsort(-times)[:_FREQUENT_SIZES]
    low, size = part.boxes_xywh[:, :2], part.boxes_xywh[:, 2:]
    whole = (size > 0).all(1)
    shapes = size[whole, 0] / size[whole, 1]
    return SplitCheck(
        images=len(part),
        boxes=len(part.box_ids),
        crowd_boxes=int(part.crowd.sum()),
        images_without_boxes=int((counts == 0).sum()),
        boxes_per_category={
            category.name: count for category, count in zip(part.categories, classes, strict=True)
        },
        boxes_by_size={
            "small": small,
            "medium": medium - small,
            "large": len(part.areas) - medium,
        },
        boxes_per_image={
            "min": int(counts.min()),
            "median": float(np.median(counts)),
            "mean": round(float(counts.mean()), 2),
            "max": int(counts.max()),
        },
        image_sizes={f"{sizes[row][1]}x{sizes[row][0]}": int(times[row]) for row in frequent},
        aspect=[round(float(v), 3) for v in np.percentile(shapes, (1, 50, 99))]
        if whole.any()
        else [],
        defects=[
            *_box_defects(part, low, size),
            *_count_defects(part, counts, classes),
            *_forgotten(part),
        ],
        notes=[note for note in part.notes if not note.startswith("read from ")],
    )


def _box_defects(
    part: Annotations, low: NDArray[np.float64], size: NDArray[np.float64]
) -> list[Defect]:
    limits = part.sizes[part.box_image][:, ::-1]
    flat = (size <= 0).any(1)
    outside = ~flat & ((low >= limits) | (low + size <= 0)).any(1)
    partly = ~flat & ~outside & ((low < -_ROUNDING) | (low + size > limits + _ROUNDING)).any(1)
    tiny = ~flat & (size < _TINY_SIDE).any(1)
    found = {
        "boxes without area": flat,
        "boxes outside their image": outside,
        "boxes partly outside their image": partly,
        f"boxes with a side under {_TINY_SIDE:g} pixels": tiny,
        f"boxes that repeat another of their class (IoU above {_DOUBLED_IOU})": _doubled(part),
    }
    defects = []
    for what, rows in found.items():
        examples = [_box_name(part, int(row)) for row in np.flatnonzero(rows)]
        if examples:
            defects.append(Defect(what, len(examples), examples))
    return defects


def _count_defects(
    part: Annotations, per_image: NDArray[np.int64], per_category: list[int]
) -> list[Defect]:
    defects = []
    crowded = np.flatnonzero(per_image > _MAX_BOXES)
    if len(crowded):
        what = f"images have more than {_MAX_BOXES} boxes: mind num_queries and max_detections"
        names = [part.images.name(int(row)) for row in crowded]
        defects.append(Defect(what, len(crowded), names))
    if zero := np.flatnonzero(part.box_ids == 0).tolist():
        what = "box has the id 0: pycocotools takes a hit on it for a miss (evaluate does not)"
        defects.append(Defect(what, len(zero), [_box_name(part, row) for row in zero]))
    pairs = zip(part.categories, per_category, strict=True)
    single = [category.name for category, count in pairs if count == 1]
    if single and len(part) > 1:
        defects.append(Defect("categories have a single box", len(single), single))
    share = max(per_category, default=0) / max(1, sum(per_category))
    if share > _MOSTLY and sum(count > 0 for count in per_category) > 1:
        name = part.categories[int(np.argmax(per_category))].name
        what = f"boxes of {name} are {share:.0%} of all: the figures of the others say more"
        defects.append(Defect(what, max(per_category)))
    return defects


def _forgotten(part: Annotations) -> list[Defect]:
    """Images whose boxes of a category may have been forgotten: most others have it, or many."""
    if len(part) < _FEWEST_IMAGES:
        return []
    kinds = len(part.categories)
    shown = np.unique(part.box_image * kinds + part.box_class) % kinds  # once for each image
    shares = np.bincount(shown, minlength=kinds) / len(part)
    defects = []
    for row in np.flatnonzero(shares > _MOST).tolist():
        name = part.categories[row].name
        counts = np.bincount(part.box_image[part.box_class == row], minlength=len(part))
        if shares.max() >= _NEARLY_ALL and shares[row] < 1:
            what = f"images have no {name}, which {shares[row]:.0%} have: forgotten boxes?"
            defects.append(_images(part, what, counts == 0))
        usual = float(np.median(counts))
        few = (counts > 0) & (counts < _FEW * usual)
        if usual >= _CROWD and few.any():
            what = (
                f"images have fewer than a third of the usual {usual:g} boxes of {name}: forgotten?"
            )
            defects.append(_images(part, what, few))
    return defects


def _images(part: Annotations, what: str, which: NDArray[np.bool_]) -> Defect:
    names = [part.images.name(int(row)) for row in np.flatnonzero(which)]
    return Defect(what, len(names), names)


def _box_name(part: Annotations, row: int) -> str:
    box = ", ".join(f"{number:g}" for number in part.boxes_xywh[row])
    name = part.images.name(int(part.box_image[row]))
    return f"{name}: {part.categories[part.box_class[row]].name} [{box}] (id {part.box_ids[row]})"


def _doubled(part: Annotations) -> NDArray[np.bool_]:
    """Which boxes nearly cover an earlier one of their class and image."""
    from torchvision.ops import box_iou

    result = np.zeros(len(part.box_ids), dtype=np.bool_)
    if len(result) == 0:
        return result
    order = np.lexsort((part.box_class, part.box_image))
    keys = np.stack([part.box_image[order], part.box_class[order]], axis=1)
    changes = (keys[1:] != keys[:-1]).any(1)
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    corners = part.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        if end - start > 1:
            rows = order[start:end]
            boxes = torch.from_numpy(corners[rows])
            close = box_iou(boxes, boxes).numpy() > _DOUBLED_IOU
            result[rows] = np.tril(close, -1).any(1)
    return result


def unused_files(splits: Mapping[str, Annotations], place: Path) -> Defect | None:
    """Image files in a folder that no split lists."""
    from detrelay.core.data.formats import SUFFIXES

    if not place.is_dir():
        return None
    used: set[str] = set()
    for part in splits.values():
        for row in range(len(part)):
            file: Any = part.images.open(row)
            if not isinstance(file, Path):  # the images are part of the dataset
                return None
            used.add(str(file.resolve()))
    spare = [
        path
        for path in sorted(place.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and str(path.resolve()) not in used
    ]
    if not spare:
        return None
    names = [str(path.relative_to(place)) for path in spare]
    return Defect("image files are named by no annotation", len(spare), names)
