"""What is wrong with annotated images: counts and examples by split, and pictures that recur."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.decode import MAX_PIXELS, read_image
from detrelay.core.errors import DataError

# COCO's borders between small, medium and large objects: areas in pixels.
_AREAS = (32**2, 96**2)
_TINY_SIDE = 4.0
# Pixels by which a box that touches a border may pass it: YOLO's fractions are rounded.
_ROUNDING = 0.1
# COCO's evaluation looks at so many detections of an image and category.
_MOST_BOXES = 100
_DOUBLED_IOU = 0.9
# Side of the grey thumbnails that are compared; two shots of one scene correlate above this.
_THUMBNAIL = 32
_NEARLY_SAME = 0.9
# One category with more of the boxes than this outweighs the others in training.
_MOSTLY = 0.8
# An image size as frequent as this in training should occur among the images that are evaluated.
_FREQUENT = 0.1
_EXAMPLES = 5
_BLOCK = 1024


@dataclass(slots=True)
class Defect:
    """A kind of fault.

    Attributes:
        what: what is wrong, in words that follow a number.
        count: how often.
        examples: the first few, for a person to look at.
        blocks: training or evaluation would stop at it.
    """

    what: str
    count: int
    examples: list[str] = field(default_factory=list)
    blocks: bool = False


@dataclass(slots=True)
class SplitCheck:
    """What a split holds, and what is wrong with it.

    Attributes:
        images: number of images.
        boxes: number of boxes, crowds too.
        crowd_boxes: those around crowds.
        images_without_boxes: images that have none.
        boxes_per_category: by name.
        boxes_by_size: small, medium and large as COCO counts, by area.
        boxes_per_image: smallest, median, mean and largest number.
        image_sizes: the most frequent, `WIDTHxHEIGHT`, with their numbers.
        aspect: 1st, 50th and 99th percentile of width over height of boxes.
        defects: by kind.
        notes: what the reader remarked.
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
    """Look at the annotations of a split; images are not opened."""
    counts = np.bincount(part.box_image, minlength=len(part))
    classes = np.bincount(part.box_class, minlength=len(part.categories)).tolist()
    small, medium = (int((part.areas < border).sum()) for border in _AREAS)
    sizes, times = np.unique(part.sizes, axis=0, return_counts=True)
    frequent = np.argsort(-times)[:_EXAMPLES]
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
        defects=[*_box_defects(part, low, size), *_count_defects(part, counts, classes)],
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
        examples = [_box_name(part, int(row)) for row in np.flatnonzero(rows)[:_EXAMPLES]]
        if examples:
            defects.append(Defect(what, int(rows.sum()), examples))
    return defects


def _count_defects(
    part: Annotations, per_image: NDArray[np.int64], per_category: list[int]
) -> list[Defect]:
    defects = []
    crowded = np.flatnonzero(per_image > _MOST_BOXES)
    if len(crowded):
        what = f"images have more than {_MOST_BOXES} boxes: mind num_queries and max_detections"
        names = [part.images.name(int(row)) for row in crowded[:_EXAMPLES]]
        defects.append(Defect(what, len(crowded), names))
    pairs = zip(part.categories, per_category, strict=True)
    single = [category.name for category, count in pairs if count == 1]
    if single and len(part) > 1:
        defects.append(Defect("categories have a single box", len(single), single[:_EXAMPLES]))
    folded = [category.name.casefold() for category in part.categories]
    alike = [c.name for c in part.categories if folded.count(c.name.casefold()) > 1]
    if alike:
        defects.append(Defect("categories differ in case only", len(alike), alike[:_EXAMPLES]))
    share = max(per_category, default=0) / max(1, sum(per_category))
    if share > _MOSTLY and sum(count > 0 for count in per_category) > 1:
        name = part.categories[int(np.argmax(per_category))].name
        what = f"boxes of {name} are {share:.0%} of all: the figures of the others say more"
        defects.append(Defect(what, max(per_category)))
    return defects


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


@dataclass(slots=True)
class Pixels:
    """What the images of a split look like.

    Attributes:
        thumbnails: [n, 1024], grey, of mean 0 and length 1; rows of zeros where there is none.
        unreadable: names of the images that cannot be read, with the reason.
    """

    thumbnails: NDArray[np.float32]
    unreadable: list[str]


def look_at_images(part: Annotations, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode every image of a split."""
    thumbnails = np.zeros((len(part), _THUMBNAIL**2), dtype=np.float32)
    unreadable = []
    for row in range(len(part)):
        height, width = part.sizes[row].tolist()
        try:
            image = read_image(
                part.images.open(row),
                size=(height, width),
                max_pixels=max_pixels,
                name=part.images.name(row),
            )
        except DataError as error:
            unreadable.append(str(error))
            continue
        thumbnails[row] = _thumbnail(image)
    return Pixels(thumbnails, unreadable)


def _thumbnail(image: torch.Tensor) -> NDArray[np.float32]:
    small = tv_functional.resize(image, [_THUMBNAIL, _THUMBNAIL], antialias=True).float().mean(0)
    values = small.flatten().numpy()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 0 else np.zeros_like(values)


def recurring(first: Pixels, second: Pixels) -> Iterator[tuple[int, int, float]]:
    """Pairs of nearly the same picture in two splits: positions and correlation, closest first."""
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(first.thumbnails), _BLOCK):
        likeness = first.thumbnails[start : start + _BLOCK] @ second.thumbnails.T
        if likeness.size == 0:
            continue
        best = likeness.argmax(1)
        for row in np.flatnonzero(likeness.max(1) > _NEARLY_SAME):
            pairs.append((start + int(row), int(best[row]), float(likeness[row, best[row]])))
    yield from sorted(pairs, key=lambda pair: -pair[2])


def check_recurring(part: Annotations, pixels: Pixels) -> Defect | None:
    """Pictures that look like an earlier one of their split."""
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(part), _BLOCK):
        block = pixels.thumbnails[start : start + _BLOCK]
        likeness = np.tril(block @ pixels.thumbnails.T, start - 1)
        for row in np.flatnonzero((likeness > _NEARLY_SAME).any(1)):
            best = int(likeness[row].argmax())
            found.append((float(likeness[row, best]), start + int(row), best))
    if not found:
        return None
    examples = [
        f"{part.images.name(row)} is like {part.images.name(best)}: correlation {value:.3f}"
        for value, row, best in sorted(found, reverse=True)[:_EXAMPLES]
    ]
    return Defect("images look like an earlier one of their split", len(found), examples)


def check_pair(
    train: tuple[str, Annotations, Pixels], other: tuple[str, Annotations, Pixels]
) -> list[Defect]:
    """What is wrong between two splits: pictures in both, categories that only one has."""
    defects = []
    pairs = list(recurring(other[2], train[2]))
    if pairs:
        examples = [
            f"{other[1].images.name(a)} ({other[0]}) is like {train[1].images.name(b)} "
            f"({train[0]}): correlation {c:.3f}"
            for a, b, c in pairs[:_EXAMPLES]
        ]
        what = f"images of {other[0]} look like one of {train[0]}, so figures on them flatter"
        defects.append(Defect(what, len(pairs), examples))
    learned, asked = (
        {part.categories[row].name for row in np.unique(part.box_class)}
        for part in (train[1], other[1])
    )
    if unknown := sorted(asked - learned):
        what = f"categories of {other[0]} have no box in {train[0]}"
        defects.append(Defect(what, len(unknown), unknown[:_EXAMPLES]))
    sizes, times = np.unique(train[1].sizes, axis=0, return_counts=True)
    present = set(map(tuple, other[1].sizes.tolist()))
    absent = [
        row
        for row in np.argsort(-times, kind="stable").tolist()
        if times[row] > _FREQUENT * len(train[1]) and tuple(sizes[row].tolist()) not in present
    ]
    if absent:
        examples = [f"{sizes[row][1]}x{sizes[row][0]}" for row in absent[:_EXAMPLES]]
        what = f"images of {train[0]} have a size that {other[0]} lacks: another camera?"
        defects.append(Defect(what, int(times[absent].sum()), examples))
    return defects


def unused_files(splits: Mapping[str, Annotations], place: Path) -> Defect | None:
    """Image files in a folder that no split names."""
    from detrelay.core.data.formats import SUFFIXES

    if not place.is_dir():
        return None
    used: set[str] = set()
    for part in splits.values():
        for row in range(len(part)):
            file: Any = part.images.open(row)
            if not isinstance(file, Path):  # the images are part of the data set
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
    names = [str(path.relative_to(place)) for path in spare[:_EXAMPLES]]
    return Defect("image files are named by no annotation", len(spare), names)
