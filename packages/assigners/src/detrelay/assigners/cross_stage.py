"""Cross-stage labels: class labels are gathered across stages, boxes stay one-to-one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners.hungarian import HungarianAssigner
from detrelay.assigners.rank_weighted import RankWeightedAssigner
from detrelay.core.boxes import cxcywh_to_xyxy, iou
from detrelay.core.criterion import Assigner, assign_together
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

Scope = Literal["all", "early", "late"]
Window = tuple[int | None, int | None]


class CrossStageAssigner:
    """StageInteractor's label assigner, on top of any assigner that works stage by stage.

    A query of stage i learns the class of a target if the same query is matched to it in some stage
    j of the window around i, and its box *of stage i* overlaps the target well enough. So a label
    is passed along one query index only, a query may learn several classes, and one whose own match
    overlaps too little learns none. Box regression keeps each stage's own matching.

    Args:
        base: gives every stage's own pairs; Hungarian matching if None.
        window: first and last offset j - i of the stages that pass on labels, None for no limit on
            that side; must include 0. (-1, None), the released setting: the stage before, the stage
            itself and all later ones.
        iou_threshold: minimum overlap of the current stage's box with the target; one value for all
            stages or one per stage.
        inclusive: an overlap equal to the threshold counts, as in the released StageInteractor;
            the paper's figure 5 writes "greater than", and so do the released Deformable DETR
            variant and our recipes of that family, see `DeformableForObjectDetection`.
        keep_own: a stage's own matches keep their label whatever their overlap. Off as in the
            released code; the paper's text does not say. Helps when nothing overlaps yet.
        leak: a query also learns the classes of other matched queries of its image whose box of
            stage i overlaps *its* target well enough, as in the released Deformable DETR variant.
        scope: which stages learn cross-stage labels: "all", "early" (the first half) or "late"
            (the rest); other stages keep the base assignment untouched.

    Raises:
        ValueError: a threshold outside [0, 1], a window without 0, or an unknown scope.

    Reference:
        Teng et al., ICCV 2023, section 3.2 and figure 5; checked against the released
        `StageInteractorHead` (MCG-NJU/StageInteractor).
    """

    def __init__(
        self,
        base: Assigner | None = None,
        window: Window = (-1, None),
        iou_threshold: float | Sequence[float] = 0.5,
        *,
        inclusive: bool = True,
        keep_own: bool = False,
        leak: bool = False,
        scope: Scope = "all",
    ) -> None:
        self.base = base if base is not None else HungarianAssigner()
        if isinstance(self.base, RankWeightedAssigner):
            raise ValueError(
                "base: a label from another stage has no rank among the pairs of this one; use "
                "rank_weighted with base cross_stage instead"
            )
        first, last = window
        if (first is not None and first > 0) or (last is not None and last < 0):
            raise ValueError(f"window must include offset 0, the stage itself; found {window}")
        thresholds = [iou_threshold] if isinstance(iou_threshold, int | float) else iou_threshold
        if not thresholds or not all(0 <= value <= 1 for value in thresholds):
            raise ValueError(f"iou_threshold must lie in [0, 1]; found {iou_threshold}")
        if scope not in ("all", "early", "late"):
            raise ValueError(f'scope must be "all", "early" or "late"; found {scope!r}')
        self.window = (first, last)
        self.thresholds = tuple(float(value) for value in thresholds)
        self.inclusive = inclusive
        self.keep_own = keep_own
        self.leak = leak
        self.scope = scope

    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        """Assign every stage.

        Args:
            stages: S predictions, logits [B, Q, K], boxes [B, Q, 4].
            targets: the objects of the batch.

        Returns:
            One assignment per stage: `boxes` the base's, `classes` the cross-stage ones. A pair
            that several stages agree on appears once.

        Raises:
            ValueError: there are neither one nor S thresholds.
        """
        return self.assign_groups([stages], targets)[0]

    @torch.no_grad()
    def assign_groups(
        self, groups: Sequence[Sequence[StagePrediction]], targets: Targets
    ) -> list[list[Assignment]]:
        """Assign the stages of several groups; labels do not leave their group."""
        for stages in groups:
            if len(self.thresholds) not in (1, len(stages)):
                raise ValueError(
                    f"iou_threshold has {len(self.thresholds)} values for {len(stages)} stages; "
                    f"give one, or one per stage"
                )
        own = assign_together(self.base, groups, targets)
        shared = _shared_labels(own, leak=self.leak)
        passes = self._passes(groups, targets, shared)
        learned = [
            self._learned(index, row, labels)
            for table, labels in zip(passes, shared, strict=True)
            for index, row in enumerate(table)
        ]
        classes = iter(_pairs_on(targets.image.device, learned))
        return [
            [
                Assignment(classes=found, boxes=pairs.boxes)
                if self._serves(index, len(group))
                else pairs
                for index, (pairs, found) in enumerate(
                    zip(group, islice(classes, len(group)), strict=True)
                )
            ]
            for group in own
        ]

    def _serves(self, index: int, count: int) -> bool:
        if self.scope == "all":
            return True
        return (index < count // 2) == (self.scope == "early")

    def _passes(
        self,
        groups: Sequence[Sequence[StagePrediction]],
        targets: Targets,
        shared: Sequence[_SharedLabels],
    ) -> list[NDArray[np.bool_]]:
        """Which labels the overlap of each stage's boxes lets pass, [S, R] of each group."""
        device = targets.image.device
        where = torch.from_numpy(np.concatenate([labels.overlaps for labels in shared], axis=1))
        sizes = [labels.overlaps.shape[1] for labels in shared]
        tables = [
            self._passes_of_group(stages, targets, columns)
            for stages, columns in zip(groups, where.to(device).split(sizes, dim=1), strict=True)
        ]
        flat = torch.cat([table.flatten() for table in tables]).cpu()
        parts = flat.split([table.numel() for table in tables])
        return [part.view(table.shape).numpy() for part, table in zip(parts, tables, strict=True)]

    def _passes_of_group(
        self, stages: Sequence[StagePrediction], targets: Targets, where: Tensor
    ) -> Tensor:
        image, query, target = where.unbind()
        predicted = cxcywh_to_xyxy(torch.stack([stage.boxes[image, query] for stage in stages]))
        target_boxes = cxcywh_to_xyxy(targets.boxes[target]).to(predicted.dtype)
        overlaps = iou(predicted, target_boxes)
        thresholds = self.thresholds * (len(stages) if len(self.thresholds) == 1 else 1)
        return torch.stack(
            [
                overlap >= least if self.inclusive else overlap > least
                for overlap, least in zip(overlaps, thresholds, strict=True)
            ]
        )

    def _learned(
        self, index: int, passes: NDArray[np.bool_], shared: _SharedLabels
    ) -> tuple[NDArray[np.int64], ...]:
        """Image, query and target of the class pairs of a stage, ordered by target and query."""
        first, last = self.window
        offset = shared.source_stage - index
        if self.keep_own:
            passes = passes | (shared.is_own & (offset == 0))
        if first is not None:
            passes = passes & (offset >= first)
        if last is not None:
            passes = passes & (offset <= last)
        rows = np.flatnonzero(passes)
        queries = int(shared.query.max(initial=0)) + 1
        _, once = np.unique(shared.target[rows] * queries + shared.query[rows], return_index=True)
        rows = rows[once]
        return shared.image[rows], shared.query[rows], shared.target[rows]


@dataclass(frozen=True)
class _SharedLabels:
    """Row r: a match of stage `source_stage` that may teach a query the class of a target.

    It does so where the box of `overlap_query` overlaps `overlap_target` well enough.

    Attributes:
        image: int64 [R], index in the batch.
        query: int64 [R], the query that would learn.
        target: int64 [R], the target whose class it would learn.
        overlap_query: int64 [R].
        overlap_target: int64 [R].
        source_stage: int64 [R], index of the stage.
        is_own: bool [R], the query is matched to that target in the source stage.
    """

    image: NDArray[np.int64]
    query: NDArray[np.int64]
    target: NDArray[np.int64]
    overlap_query: NDArray[np.int64]
    overlap_target: NDArray[np.int64]
    source_stage: NDArray[np.int64]
    is_own: NDArray[np.bool_]

    @property
    def overlaps(self) -> NDArray[np.int64]:
        """Image, query and target of the overlaps that are compared with the threshold, [3, R]."""
        return np.stack([self.image, self.overlap_query, self.overlap_target])


def _shared_labels(groups: Sequence[Sequence[Assignment]], *, leak: bool) -> list[_SharedLabels]:
    """The labels that the stages of each group pass on, all read in one transfer.

    Args:
        groups: each stage's own assignment.
        leak: queries learn from other matched queries of their image too.
    """
    pairs = [assignment.classes for group in groups for assignment in group]
    columns = torch.stack(
        [torch.cat([getattr(p, name) for p in pairs]) for name in ("image", "query", "target")]
    )
    rest = columns.cpu().numpy()
    result = []
    for group in groups:
        sizes = [len(assignment.classes) for assignment in group]
        own, rest = np.split(rest, [sum(sizes)], axis=1)
        result.append(_shared_in_group(own, sizes, leak=leak))
    return result


def _shared_in_group(
    columns: NDArray[np.int64], sizes: Sequence[int], *, leak: bool
) -> _SharedLabels:
    """The labels of one group, from image, query and target [3, R] of its stages' pairs."""
    image, query, target = columns
    source_stage = np.repeat(np.arange(len(sizes)), sizes)
    learner = source = np.arange(len(source_stage))
    if leak:
        starts = np.searchsorted(source_stage, np.arange(len(sizes) + 1))
        met = [
            start + np.argwhere(image[start:stop, None] == image[start:stop])
            for start, stop in pairwise(starts)
        ]
        learner, source = np.concatenate(met).T
    return _SharedLabels(
        image=image[learner],
        query=query[learner],
        target=target[source],
        overlap_query=query[source],
        overlap_target=target[learner],
        source_stage=source_stage[learner],
        is_own=learner == source,
    )


def _pairs_on(
    device: torch.device, columns: Sequence[tuple[NDArray[np.int64], ...]]
) -> list[Pairs]:
    """Pairs of every stage from their columns, moved to the device at once."""
    table = np.concatenate([np.stack(column) for column in columns], axis=1)
    lengths = [len(column[0]) for column in columns]
    parts = torch.from_numpy(table).to(device).split(lengths, dim=1)
    return [Pairs(*part.unbind()) for part in parts]
