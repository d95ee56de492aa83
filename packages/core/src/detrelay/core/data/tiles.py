"""Overlapping tiles of large pictures with small objects: for training, and for prediction.

A model sees a tile as it would see an image, so objects keep their size where the whole picture
would have to be shrunk. Tiles overlap, so that an object smaller than the overlap is whole in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detrelay.core.boxes import area, intersection, iou
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.geometry import cut
from detrelay.core.data.sample import Sample
from detrelay.core.errors import DataError

# A box that comes as near to an inner border of its tile was probably cut there, pixels.
_CUT = 2.0
# A box that was cut repeats another of its class that covers this share of it.
_COVERED = 0.5


@dataclass(frozen=True, slots=True)
class Window:
    """A tile of an image, pixels."""

    top: int
    left: int
    height: int
    width: int


def windows(height: int, width: int, size: int, overlap: float) -> list[Window]:
    """Tiles that cover an image, row by row, evenly spread.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        size: side of a tile, pixels; an image that is smaller makes smaller tiles.
        overlap: least share of a tile that the next one shows again, 0 to below 1.
    """
    rows, columns = (_starts(side, size, overlap) for side in (height, width))
    return [
        Window(top, left, min(size, height), min(size, width)) for top in rows for left in columns
    ]


def _starts(side: int, size: int, overlap: float) -> list[int]:
    if side <= size:
        return [0]
    step = max(1, int(size * (1 - overlap)))
    count = -(-(side - size) // step)
    return [round(number * (side - size) / count) for number in range(count + 1)]


class TiledImages(Dataset[Sample]):
    """The tiles of an annotated data set, each a sample of its own.

    A tile keeps the boxes of which it shows enough, cut to it. It bears the id of its image; its
    original size is its own. The whole image is read for each of its tiles.

    Args:
        samples: the images.
        size: side of a tile, pixels.
        overlap: see `windows`.
        visible: share of a box that a tile must show to keep it; the other tiles keep what is
            theirs, so a box cut in two may be in both, or in none.
        keep_empty: keep tiles without any box too.

    Attributes:
        sizes: int64 [N, 2], (height, width) of each tile, pixels.

    Raises:
        DataError: no tile holds a box, and empty ones are not to be kept.
    """

    def __init__(
        self,
        samples: AnnotatedImages,
        *,
        size: int,
        overlap: float,
        visible: float,
        keep_empty: bool,
    ) -> None:
        self.samples = samples
        self.visible = visible
        rows: list[tuple[int, int, int, int, int]] = []
        for index, (height, width) in enumerate(samples.sizes.tolist()):
            boxes = samples.boxes(index)
            for window in windows(height, width, size, overlap):
                if keep_empty or bool(shown(boxes, window, visible).any()):
                    rows.append((index, window.top, window.left, window.height, window.width))
        if not rows:
            raise DataError(
                f"{samples.annotations.source}: no tile shows {visible:g} of a box; lower "
                f"data.tile_visible or enlarge data.tile_size"
            )
        self._rows = np.array(rows, dtype=np.int64)  # processes share it
        self.sizes = self._rows[:, 3:]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Read the image of tile `index` (0..len - 1) and cut it.

        Raises:
            DataError: the image cannot be read.
        """
        row, top, left, height, width = self._rows[index].tolist()
        sample = self.samples[row]
        window = Window(top, left, height, width)
        keep = shown(sample.boxes_xyxy, window, self.visible)
        chosen = Sample(
            sample.image,
            sample.boxes_xyxy[keep],
            sample.class_labels[keep],
            sample.image_id,
            (height, width),
        )
        return cut(chosen, top, left, height, width)


def shown(boxes_xyxy: Tensor, window: Window, visible: float) -> Tensor:
    """Which boxes [n, 4] a tile shows by at least that share of their area, bool [n]."""
    right, bottom = window.left + window.width, window.top + window.height
    tile = boxes_xyxy.new_tensor([window.left, window.top, right, bottom])
    seen = intersection(boxes_xyxy, tile)
    return (seen > 0) & (seen >= visible * area(boxes_xyxy))


def merge(
    results: Sequence[dict[str, Tensor]],
    tiles: Sequence[Window],
    shape: tuple[int, int],
    iou_threshold: float,
) -> dict[str, Tensor]:
    """Detections of the tiles as detections of the image, each object once.

    Of boxes of one class that overlap by more than the threshold the best score stays (NMS). A box
    at an inner border of its tile was probably cut: it comes after all whole boxes, and goes where
    another covers half of it. An object that no tile shows whole stays in pieces.

    Args:
        results: of each tile `scores` [n], `labels` [n] and `boxes` [n, 4] xyxy in its pixels.
        tiles: where each lies.
        shape: (height, width) of the image, pixels.
        iou_threshold: 0 to 1.

    Returns:
        The same keys; boxes in pixels of the image, best score first.
    """
    moved = [
        found["boxes"] + found["boxes"].new_tensor([t.left, t.top, t.left, t.top])
        for found, t in zip(results, tiles, strict=True)
    ]
    pieces = torch.cat([_cut_off(b, t, shape) for b, t in zip(moved, tiles, strict=True)])
    boxes = torch.cat(moved)
    scores, labels = (torch.cat([found[key] for found in results]) for key in ("scores", "labels"))
    kept = torch.zeros(len(boxes), dtype=torch.bool)
    for label in labels.unique():
        rows = torch.nonzero(labels == label).flatten()
        order = torch.argsort(scores[rows] - pieces[rows] * 2.0, descending=True, stable=True)
        rows = rows[order]
        kept[rows[_distinct(boxes[rows], pieces[rows], iou_threshold)]] = True
    chosen = torch.nonzero(kept).flatten()
    chosen = chosen[torch.argsort(scores[chosen], descending=True, stable=True)]
    return {"scores": scores[chosen], "labels": labels[chosen], "boxes": boxes[chosen]}


def _cut_off(boxes: Tensor, tile: Window, shape: tuple[int, int]) -> Tensor:
    """Which boxes [n, 4] of the image reach an inner border of their tile, bool [n]."""
    borders = (tile.left, tile.top, tile.left + tile.width, tile.top + tile.height)
    inner = (
        tile.left > 0,
        tile.top > 0,
        tile.left + tile.width < shape[1],
        tile.top + tile.height < shape[0],
    )
    near = (boxes - boxes.new_tensor(borders)).abs() <= _CUT
    return (near & torch.tensor(inner)).any(1)


def _distinct(boxes: Tensor, pieces: Tensor, iou_threshold: float) -> Tensor:
    """Rows of boxes, best first, that repeat no better one."""
    rows, columns = boxes[:, None], boxes[None]
    covered = intersection(rows, columns) / area(boxes).clamp(min=1e-6)[None]
    repeats = (iou(rows, columns) > iou_threshold) | ((covered > _COVERED) & pieces[None])
    gone = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for row in range(len(boxes)):
        if not gone[row]:
            kept.append(row)
            gone |= repeats[row]
    return torch.tensor(kept, dtype=torch.int64)
