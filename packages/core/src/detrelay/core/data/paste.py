"""Objects of other images pasted beside those of an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detrelay.core.boxes import intersection
from detrelay.core.data.geometry import cut, resize_to
from detrelay.core.data.sample import Sample

_TRIES = 10  # random places for a piece
_SMALLEST_PIECE = 8  # pixels


@dataclass(frozen=True)
class Paste:
    """Pieces of other images, each with one object, where they cover no object.

    More objects for the same pixels: on small data, with few objects per image, that is what a
    decoder learns from. A piece is a rectangle around the object with a random margin, so that its
    edges do not tell where the box ends; objects that touch others are not used.

    Attributes:
        count: images to take a random object from; those without a suitable one, or for whose piece
            no place is found, give none.
        scales: range of the factor by which a piece is resized.
        margin: maximum width of the surroundings on each side, share of the side of the box.

    Reference:
        Dwibedi et al., Cut, Paste and Learn, ICCV 2017 (arXiv 1708.01642), with boxes for masks.
    """

    count: int = 3
    scales: tuple[float, float] = (0.6, 1.2)
    margin: float = 0.3

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"count must be at least 1, found {self.count}")
        low, high = self.scales
        if not 0 < low <= high:
            raise ValueError(f"scales must be a range above 0, found {low:g} to {high:g}")
        if self.margin < 0:
            raise ValueError(f"margin must be at least 0, found {self.margin:g}")

    def join(self, sample: Sample, another: Callable[[], Sample]) -> Sample:
        """The image with up to `count` more objects; nothing of its own is covered."""
        image, boxes, labels = sample.image.clone(), sample.boxes_xyxy, sample.class_labels
        for _ in range(self.count):
            piece = self._piece(another())
            if piece is None:
                continue
            height, width = piece.image.shape[-2:]
            place = _free_place(boxes, (height, width), (image.shape[-2], image.shape[-1]))
            if place is None:
                continue
            top, left = place
            image[:, top : top + height, left : left + width] = piece.image
            moved = piece.boxes_xyxy + piece.boxes_xyxy.new_tensor([left, top, left, top])
            boxes = torch.cat([boxes, moved])
            labels = torch.cat([labels, piece.class_labels])
        return replace(sample, image=image, boxes_xyxy=boxes, class_labels=labels)

    def _piece(self, sample: Sample) -> Sample | None:
        """A random object with some of what surrounds it; None if it touches another."""
        boxes = sample.boxes_xyxy
        if not len(boxes):
            return None
        chosen = int(torch.randint(len(boxes), ()))
        left, top, right, bottom = boxes[chosen].tolist()
        shares = (self.margin * torch.rand(4)).tolist()
        height, width = sample.image.shape[-2:]
        x0 = max(0, int(left - shares[0] * (right - left)))
        y0 = max(0, int(top - shares[1] * (bottom - top)))
        x1 = min(width, int(right + shares[2] * (right - left)) + 1)
        y1 = min(height, int(bottom + shares[3] * (bottom - top)) + 1)
        touched = _overlaps(boxes, boxes.new_tensor([x0, y0, x1, y1]))
        if touched.sum() > 1:
            return None
        piece = cut(sample, y0, x0, y1 - y0, x1 - x0)
        low, high = self.scales
        factor = low + (high - low) * float(torch.rand(()))
        size = (round(factor * (y1 - y0)), round(factor * (x1 - x0)))
        if min(size) < _SMALLEST_PIECE or not len(piece.boxes_xyxy):
            return None
        return resize_to(piece, size)


def _free_place(
    boxes: Tensor, size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[int, int] | None:
    """Top and left of a random place that covers none of the boxes; None if none was found."""
    rows, columns = canvas[0] - size[0], canvas[1] - size[1]
    if rows < 0 or columns < 0:
        return None
    for _ in range(_TRIES):
        top, left = int(torch.randint(rows + 1, ())), int(torch.randint(columns + 1, ()))
        piece = boxes.new_tensor([left, top, left + size[1], top + size[0]])
        if not _overlaps(boxes, piece).any():
            return top, left
    return None


def _overlaps(boxes: Tensor, box: Tensor) -> Tensor:
    """Which of [n, 4] share area with [4], bool [n]."""
    return intersection(boxes, box.expand_as(boxes)) > 0
