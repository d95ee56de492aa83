"""The annotations of one split in numpy columns, as returned by every reader.

Columns instead of one Python object per box: a million boxes take about 70 MB, and loader processes
share them. (Python objects would be copied merely by counting references to them.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrelay.core.data.images import ImageStore, Selected
from detrelay.core.data.sample import Category

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Boxes in the expected convention are rarely also corners of a valid box: right of the middle a box
# is narrower than its own x.
_NEARLY_ALL, _LEAVING = 0.95, 0.25


@dataclass(frozen=True, slots=True)
class Annotations:
    """Images and boxes of a split as in its files; nothing is clipped or dropped yet.

    Attributes:
        source: the file or folder they were read from, for messages.
        categories: in the order of `box_class`.
        images: the pixels.
        image_ids: [N], unique.
        sizes: [N, 2], (height, width), pixels.
        boxes_xywh: [M, 4], left, top, width, height in pixels, origin at the upper left corner.
        box_image: [M], position of each box's image, 0..N-1.
        box_class: [M], position of each box's category.
        box_ids: [M], unique.
        areas: [M], pixels; of the object's outline if the file has it, else of the box.
        crowd: [M], whether the box surrounds a crowd.
        notes: what was repaired or dropped while reading, a sentence each.
        own_ids: False if the format has no category ids and the reader numbered the names.
    """

    source: str
    categories: tuple[Category, ...]
    images: ImageStore
    image_ids: Ints
    sizes: Ints
    boxes_xywh: Floats
    box_image: Ints
    box_class: Ints
    box_ids: Ints
    areas: Floats
    crowd: NDArray[np.bool_]
    notes: tuple[str, ...] = ()
    own_ids: bool = True

    def __len__(self) -> int:
        return len(self.image_ids)

    def select(self, images: Ints | NDArray[np.bool_]) -> Annotations:
        """Only these images (by position or by mask), and their boxes."""
        chosen = np.flatnonzero(images) if images.dtype == np.bool_ else images.astype(np.int64)
        place = np.full(len(self), -1, dtype=np.int64)
        place[chosen] = np.arange(len(chosen))
        kept = place[self.box_image] >= 0
        return replace(
            self.with_boxes(kept),
            images=Selected(self.images, chosen),
            image_ids=self.image_ids[chosen],
            sizes=self.sizes[chosen],
            box_image=place[self.box_image[kept]],
        )

    def with_boxes(self, kept: NDArray[np.bool_]) -> Annotations:
        """Only the boxes of a mask."""
        columns = ("boxes_xywh", "box_image", "box_class", "box_ids", "areas", "crowd")
        changed: dict[str, Any] = {name: getattr(self, name)[kept] for name in columns}
        return replace(self, **changed)

    def to_coco(self) -> dict[str, Any]:
        """The same as a COCO detection dictionary."""
        ids, classes = self.image_ids.tolist(), [category.id for category in self.categories]
        return {
            "images": [
                {"id": image_id, "file_name": self.images.name(row), "width": w, "height": h}
                for row, (image_id, (h, w)) in enumerate(zip(ids, self.sizes.tolist(), strict=True))
            ],
            "annotations": [
                {
                    "id": box_id,
                    "image_id": ids[image],
                    "category_id": classes[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for box_id, image, label, box, area, crowd in zip(
                    *(
                        column.tolist()
                        for column in (
                            self.box_ids,
                            self.box_image,
                            self.box_class,
                            self.boxes_xywh,
                            self.areas,
                            self.crowd,
                        )
                    ),
                    strict=True,
                )
            ],
            "categories": [{"id": entry.id, "name": entry.name} for entry in self.categories],
        }


def doubtful_boxes(boxes_xywh: Floats, limits: Ints) -> str | None:
    """A sentence if nearly all boxes look as if they were written in another convention.

    Args:
        boxes_xywh: [M, 4].
        limits: [M, 2], width and height of each box's image.
    """
    if boxes_xywh.size == 0:
        return None
    if np.quantile(np.abs(boxes_xywh).max(1), _NEARLY_ALL) <= 1 and limits.min() > 1:
        return (
            "nearly all boxes lie within one pixel: they look like fractions of the image, where "
            "pixels are expected"
        )
    low, high = boxes_xywh[:, :2], boxes_xywh[:, 2:]
    corners = ((low < high) & (low >= 0) & (high <= limits)).all(1)
    leaves = (low + high > limits + 1).any(1)
    if corners.mean() >= _NEARLY_ALL and leaves.mean() >= _LEAVING:
        return (
            f"{int(leaves.sum())} of {len(boxes_xywh)} boxes leave their image, but would fit as "
            "corners x1, y1, x2, y2 where x, y, width, height is expected"
        )
    return None


def alike_names(names: Iterable[str]) -> list[str]:
    """A sentence for each group of names that differ only in case."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.casefold(), []).append(name)
    return [
        f"categories {' and '.join(sorted(group))} differ in case only"
        for group in groups.values()
        if len(group) > 1
    ]
