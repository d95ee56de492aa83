"""Assigners that decide image by image from tables of costs or scores, on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, iou
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

Table = NDArray[Any]  # [..., T of the image, Q]
Rows = NDArray[np.int64]  # [n, 2], query and row of the image's targets
BoxSource = Literal["predicted", "references"]


class TableAssigner(ABC):
    """Makes its tables for all stages on the device, moves them once, and decides in numpy.

    Everything is decided within an image, so the rest of the batch does not change its assignment.
    """

    @torch.no_grad()
    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        """Assign every stage.

        Args:
            stages: S predictions, logits [B, Q, K], boxes [B, Q, 4].
            targets: the objects of the batch.

        Returns:
            One assignment per stage.

        Raises:
            FloatingPointError: a cost or score is NaN or infinite; names stage and images.
            ValueError: the stages lack something that this assigner needs.
        """
        tables = torch.stack([self.tables(stage, targets) for stage in stages])  # [S, N, T, Q]
        return self._decide(tables.cpu().numpy(), targets)

    @abstractmethod
    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """What `choose` decides from, [N, T, Q], without gradient."""

    @abstractmethod
    def choose(self, tables: Table, stage: int, image: int) -> tuple[Rows, Rows]:
        """Class pairs and box pairs of one image.

        Args:
            tables: [N, T of the image, Q]; the image has objects.
            stage: index of the stage.
            image: index in the batch.
        """

    def _decide(self, tables: Table, targets: Targets) -> list[Assignment]:
        image_cpu = targets.image.cpu().numpy()
        rows_of = {int(i): np.flatnonzero(image_cpu == i) for i in np.unique(image_cpu)}
        chosen: list[list[Rows]] = []
        for index, stage in enumerate(tables):
            _check_finite(stage, image_cpu, index)
            classes, boxes = [], []
            for image, rows in rows_of.items():
                own = self.choose(stage[:, rows], index, image)
                same = own[0] is own[1]
                classes.append(_in_batch(own[0], image, rows))
                boxes.append(classes[-1] if same else _in_batch(own[1], image, rows))
            shared = all(a is b for a, b in zip(classes, boxes, strict=True))
            chosen.append([_stacked(classes)] if shared else [_stacked(classes), _stacked(boxes)])
        return _assignments(chosen, targets.image.device)


def _assignments(chosen: Sequence[Sequence[Rows]], device: torch.device) -> list[Assignment]:
    """Move all pairs to the device at once; per stage, one array serves classes and boxes alike."""
    arrays = [array for stage in chosen for array in stage]
    columns = torch.from_numpy(np.concatenate(arrays, axis=1)).to(device)
    parts = iter(columns.split([array.shape[1] for array in arrays], dim=1))
    result = []
    for stage in chosen:
        found = [Pairs(*next(parts).unbind()) for _ in stage]
        result.append(Assignment(classes=found[0], boxes=found[-1]))
    return result


def _in_batch(chosen: Rows, image: int, rows: NDArray[np.int64]) -> Rows:
    """Image, query and target [3, n]."""
    where = np.full(len(chosen), image, dtype=np.int64)
    return np.stack([where, chosen[:, 0], rows[chosen[:, 1]]])


def _stacked(parts: Sequence[Rows]) -> Rows:
    return np.concatenate([np.zeros((3, 0), dtype=np.int64), *parts], axis=1)


def _check_finite(tables: Table, image: NDArray[np.int64], stage: int) -> None:
    bad = ~np.isfinite(tables).all(axis=(0, 2))
    if bad.any():
        raise FloatingPointError(
            f"non-finite matching cost in stage {stage}; "
            f"images of the batch: {sorted(set(image[bad].tolist()))}"
        )


def rows_of(query: NDArray[Any], target: NDArray[Any]) -> Rows:
    """Pairs [n, 2] from their columns."""
    return np.stack([query, target], axis=1).astype(np.int64)


def check_box_source(boxes: str, allowed: Sequence[str] = ("predicted", "references")) -> None:
    """Reject an unknown choice of boxes.

    Raises:
        ValueError: it is not one of those allowed.
    """
    if boxes not in allowed:
        raise ValueError(f"boxes must be {' or '.join(map(repr, allowed))}, found {boxes!r}")


def with_boxes(stage: StagePrediction, boxes: str) -> StagePrediction:
    """The prediction with the boxes that an assigner is to use.

    Raises:
        ValueError: references are requested and the stage has none.
    """
    if boxes == "predicted":
        return stage
    if stage.references is None:
        raise ValueError(
            f"boxes = {boxes!r} needs the boxes that a stage started from, but the head provides "
            f'none; use boxes = "predicted"'
        )
    return replace(stage, boxes=stage.references)


def overlap_table(stage: StagePrediction, targets: Targets, epsilon: float = 0.0) -> Tensor:
    """IoU [T, Q] of the stage's boxes with each target of their image."""
    predicted = cxcywh_to_xyxy(stage.boxes[targets.image])  # [T, Q, 4]
    target = cxcywh_to_xyxy(targets.boxes.to(predicted.dtype))[:, None]
    return iou(predicted, target, epsilon)


def score_table(stage: StagePrediction, targets: Targets) -> Tensor:
    """Probability [T, Q] of each target's class."""
    return stage.logits[targets.image, :, targets.labels].sigmoid()
