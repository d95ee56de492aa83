"""Structures shared along the data path: categories, samples, and a report on the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # readers work without torch, so that files can be scored without it
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects.

    Attributes:
        id: the dataset's own category id; ids may have gaps and need not start at 0 or 1.
        name: name of the category.
    """

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its objects.

    Attributes:
        image: uint8 [3, H, W], RGB.
        boxes_xyxy: float32 [n, 4], corners in pixels of `image`. n = 0 is valid.
        class_labels: int64 [n], class indices 0..K-1.
        image_id: the dataset's own image id.
        original_size: (height, width) of the image as stored, pixels; transforms keep it.
        size_draw: number in [0, 1) that a random size follows from, where the images of a batch
            share it; None where each image draws its own.
    """

    image: Tensor
    boxes_xyxy: Tensor
    class_labels: Tensor
    image_id: int
    original_size: tuple[int, int]
    size_draw: float | None = None


@dataclass(frozen=True, slots=True)
class DataReport:
    """The content of a dataset and what was dropped from its samples.

    Attributes:
        images: number of images.
        boxes: boxes in samples.
        images_without_boxes: images whose sample has no box.
        crowd_boxes: boxes around crowds, which only the evaluator sees.
        dropped_boxes: boxes dropped from the samples, by reason.
        clipped_boxes: boxes clipped to their image; included in `boxes`.
        left_out_images: images without any annotation, left out as requested.
        notes: other remarks on the files, a sentence each.
    """

    images: int
    boxes: int
    images_without_boxes: int
    crowd_boxes: int
    dropped_boxes: Mapping[str, int]
    clipped_boxes: int
    left_out_images: int = 0
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The report as one line."""
        parts = [
            f"{self.images} images ({self.images_without_boxes} without boxes)",
            f"{self.boxes} boxes",
        ]
        if self.crowd_boxes:
            parts.append(f"{self.crowd_boxes} crowd boxes kept for evaluation only")
        parts += [f"{count} boxes dropped: {why}" for why, count in self.dropped_boxes.items()]
        if self.clipped_boxes:
            parts.append(f"{self.clipped_boxes} boxes clipped to their image")
        if self.left_out_images:
            parts.append(f"{self.left_out_images} images without annotations left out")
        return "; ".join([", ".join(parts), *self.notes])


def some(values: object, examples: int = 3) -> str:
    """The first few of a list, for messages."""
    shown = list(values)  # type: ignore[call-overload]
    return ", ".join(map(str, shown[:examples])) + (", ..." if len(shown) > examples else "")


def shown(value: object, longest: int = 80) -> str:
    """A value from a file for a message, truncated if long.

    A number of thousands of digits, which Python refuses to print, is described instead.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= longest else f"{text[:longest]}..."
