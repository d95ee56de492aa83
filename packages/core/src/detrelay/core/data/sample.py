"""What the parts of the data path hand on: categories, samples, and a report of what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # readers do without torch, so that files can be scored where there is none
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Category:
    """A class of objects.

    Attributes:
        id: the data set's own category id; ids may have gaps and need not start at 0 or 1.
        name: what the category is called.
    """

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its objects.

    Attributes:
        image: uint8 [3, H, W], RGB.
        boxes_xyxy: float32 [n, 4], corners in pixels of `image`. n = 0 is legal.
        class_labels: int64 [n], class indices 0..K-1.
        image_id: the data set's own image id.
        original_size: (height, width) of the image as stored, pixels; transforms keep it.
    """

    image: Tensor
    boxes_xyxy: Tensor
    class_labels: Tensor
    image_id: int
    original_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a data set holds and what was left out of its samples.

    Attributes:
        images: number of images.
        boxes: boxes that samples hold.
        images_without_boxes: images whose sample holds no box.
        crowd_boxes: boxes around crowds, which only the evaluator sees.
        dropped_boxes: boxes left out of the samples, by reason.
        clipped_boxes: boxes cut to their image; they count among `boxes`.
        left_out_images: images without any annotation that were asked to be left out.
        notes: what else a reader of the files should know, a sentence each.
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
    """A value of a file as a message shows it: cut where it is long.

    A number of thousands of digits, which Python refuses to print, is described.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= longest else f"{text[:longest]}..."
