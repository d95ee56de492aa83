"""Assigners that decide image by image from tables of costs or scores, on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners.costs import of_classes, of_targets
from detrelay.core.boxes import cxcywh_to_xyxy, iou
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

Table = NDArray[Any]  # [..., T of the image, Q]
Rows = NDArray[np.int64]  # [n, 2], query and row of the image's targets
BoxSource = Literal["predicted", "references"]

# Numbers (scores and costs) of the stages that are taken together: what fits the cache of a CPU,
# where calls cost little; elsewhere a bound on memory, as every call costs a launch.
_JOINED_ON_CPU = 1 << 15
_JOINED_ELSEWHERE = 1 << 26


class TableAssigner(ABC):
    """Makes its tables for all stages on the device, moves them once, and decides in numpy.

    Everything is decided within an image, so the rest of the batch does not change its assignment.
    Stages of one shape are therefore taken together where that pays, as one batch that holds their
    images one after another.
    """

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
        return self.assign_groups([stages], targets)[0]

    @torch.no_grad()
    def assign_groups(
        self, groups: Sequence[Sequence[StagePrediction]], targets: Targets
    ) -> list[list[Assignment]]:
        """Assign the stages of several groups, each as if alone, with one transfer each way."""
        stages = [stage for group in groups for stage in group]
        tables = _on_host(
            [
                table
                for run in _runs(stages, len(targets))
                for table in self._tables_of_run(run, targets)
            ]
        )
        index_in_group = [index for group in groups for index in range(len(group))]
        found = iter(self._decide(tables, index_in_group, targets))
        return [[next(found) for _ in group] for group in groups]

    def _tables_of_run(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Tensor]:
        """The tables [N, T, Q] of stages of one shape: those of one batch with all their images."""
        if len(stages) == 1:
            return [self.tables(stages[0], targets)]
        joined = self.tables(joined_stages(stages), joined_targets(targets, len(stages)))
        return list(joined.split(len(targets), dim=1)) if len(targets) else [joined] * len(stages)

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

    def _decide(
        self, tables: Sequence[Table], index_in_group: Sequence[int], targets: Targets
    ) -> list[Assignment]:
        image = targets.image.cpu().numpy()
        rows = np.argsort(image, kind="stable")
        images, starts = np.unique(image[rows], return_index=True)
        bounds = list(zip(images.tolist(), pairwise([*starts, len(rows)]), strict=True))
        chosen: list[list[list[Rows]]] = []
        for index, table in zip(index_in_group, tables, strict=True):
            _check_finite(table, image, index)
            ordered = table[:, rows]
            found = [
                self.choose(ordered[:, start:stop], index, own) for own, (start, stop) in bounds
            ]
            kinds = [[classes for classes, _ in found], [boxes for _, boxes in found]]
            shared = all(classes is boxes for classes, boxes in found)
            chosen.append(kinds[:1] if shared else kinds)
        return _assignments(chosen, images, starts, rows, targets.image.device)


def _runs(stages: Sequence[StagePrediction], num_targets: int) -> list[Sequence[StagePrediction]]:
    """Neighbouring stages of one shape, as many together as pays."""
    runs: list[list[StagePrediction]] = []
    for stage in stages:
        size = stage.logits.numel() + num_targets * stage.logits.shape[1]
        limit = _JOINED_ON_CPU if stage.logits.device.type == "cpu" else _JOINED_ELSEWHERE
        if (
            runs
            and stage.logits.shape == runs[-1][0].logits.shape
            and (stage.references is None) == (runs[-1][0].references is None)
            and (len(runs[-1]) + 1) * size <= limit
        ):
            runs[-1].append(stage)
        else:
            runs.append([stage])
    return list(runs)


def joined_stages(stages: Sequence[StagePrediction]) -> StagePrediction:
    """Stages of B images each as one of S x B images."""
    references = [stage.references for stage in stages if stage.references is not None]
    return StagePrediction(
        logits=torch.cat([stage.logits for stage in stages]),
        boxes=torch.cat([stage.boxes for stage in stages]),
        references=torch.cat(references) if references else None,
    )


def joined_targets(targets: Targets, times: int) -> Targets:
    """The objects of a batch that holds the images of `targets` several times."""
    first = torch.arange(times, device=targets.image.device) * targets.batch_size
    return Targets(
        labels=targets.labels.repeat(times),
        boxes=targets.boxes.repeat(times, 1),
        image=(targets.image + first[:, None]).flatten(),
        batch_size=times * targets.batch_size,
    )


def _on_host(tables: Sequence[Tensor]) -> list[Table]:
    """All tables, in one transfer where there is one."""
    if tables and tables[0].device.type != "cpu":
        flat = torch.cat([table.flatten() for table in tables]).cpu()
        parts = flat.split([table.numel() for table in tables])
        tables = [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]
    return [table.numpy() for table in tables]


def _assignments(
    chosen: Sequence[Sequence[Sequence[Rows]]],
    images: NDArray[np.int64],
    starts: NDArray[np.int64],
    rows: NDArray[np.int64],
    device: torch.device,
) -> list[Assignment]:
    """Move all pairs to the device at once; per stage, one array serves classes and boxes alike.

    Args:
        chosen: pairs of each image with objects, by stage and kind.
        images: which images these are.
        starts: where their objects begin in `rows`.
        rows: the objects, image by image.
        device: where the pairs go.
    """
    parts = [part for stage in chosen for part in stage]
    sizes = np.array([[len(pairs) for pairs in part] for part in parts], dtype=np.int64)
    sizes = sizes.reshape(len(parts), len(images))
    pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *chain.from_iterable(parts)])
    owner = np.repeat(np.tile(np.arange(len(images)), len(parts)), sizes.ravel())
    columns = np.stack([images[owner], pairs[:, 0], rows[starts[owner] + pairs[:, 1]]])
    moved = iter(torch.from_numpy(columns).to(device).split(sizes.sum(1).tolist(), dim=1))
    result = []
    for stage in chosen:
        found = [Pairs(*next(moved).unbind()) for _ in stage]
        result.append(Assignment(classes=found[0], boxes=found[-1]))
    return result


def _check_finite(tables: Table, image: NDArray[np.int64], stage: int) -> None:
    bad = ~np.isfinite(tables).all(axis=(0, 2))
    if bad.any():
        raise FloatingPointError(
            f"non-finite matching cost in stage {stage}; "
            f"images of the batch: {sorted(set(image[bad].tolist()))}"
        )


def rows_of(query: NDArray[Any], target: NDArray[Any]) -> Rows:
    """Pairs [n, 2] from their columns."""
    rows = np.empty((len(query), 2), dtype=np.int64)
    rows[:, 0], rows[:, 1] = query, target
    return rows


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
    predicted = of_targets(cxcywh_to_xyxy(stage.boxes), targets)
    target = cxcywh_to_xyxy(targets.boxes.to(predicted.dtype))[:, None]
    return iou(predicted, target, epsilon)


def score_table(stage: StagePrediction, targets: Targets) -> Tensor:
    """Probability [T, Q] of each target's class."""
    return of_classes(stage.logits, targets).sigmoid()
