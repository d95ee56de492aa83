"""Cross-stage labels: class labels are gathered across stages, boxes stay one-to-one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from detrelay.assigners.hungarian import HungarianAssigner
from detrelay.assigners.rank_weighted import RankWeightedAssigner
from detrelay.core.boxes import cxcywh_to_xyxy, iou
from detrelay.core.criterion import Assigner
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

    @torch.no_grad()
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
        count = len(stages)
        if len(self.thresholds) not in (1, count):
            raise ValueError(
                f"iou_threshold has {len(self.thresholds)} values for {count} stages; "
                f"give one, or one per stage"
            )
        own = self.base(stages, targets)
        shared = _SharedLabels.of(own, leak=self.leak)
        passes = self._passes(stages, targets, shared)
        learned = [self._learned(index, passes[index], shared) for index in range(count)]
        classes = _pairs_on(targets.image.device, learned)
        return [
            Assignment(classes=classes[index], boxes=pairs.boxes)
            if self._serves(index, count)
            else pairs
            for index, pairs in enumerate(own)
        ]

    def _serves(self, index: int, count: int) -> bool:
        if self.scope == "all":
            return True
        return (index < count // 2) == (self.scope == "early")

    def _passes(
        self, stages: Sequence[StagePrediction], targets: Targets, shared: _SharedLabels
    ) -> NDArray[np.bool_]:
        """Which labels the overlap of each stage's boxes lets pass, [S, R], in one transfer."""
        where = torch.from_numpy(
            np.stack([shared.image, shared.overlap_query, shared.overlap_target])
        )
        image, query, target = where.to(targets.image.device).unbind()
        predicted = cxcywh_to_xyxy(torch.stack([stage.boxes[image, query] for stage in stages]))
        target_boxes = cxcywh_to_xyxy(targets.boxes[target]).to(predicted.dtype)
        overlaps = iou(predicted, target_boxes)
        thresholds = self.thresholds * (len(stages) if len(self.thresholds) == 1 else 1)
        passes: NDArray[np.bool_] = (
            torch.stack(
                [
                    overlap >= least if self.inclusive else overlap > least
                    for overlap, least in zip(overlaps, thresholds, strict=True)
                ]
            )
            .cpu()
            .numpy()
        )
        return passes

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

    @classmethod
    def of(cls, own: Sequence[Assignment], *, leak: bool) -> _SharedLabels:
        """The labels that stages pass on, read in one transfer.

        Args:
            own: each stage's own assignment.
            leak: queries learn from other matched queries of their image too.
        """
        pairs = [stage.classes for stage in own]
        columns = torch.stack(
            [torch.cat([getattr(p, name) for p in pairs]) for name in ("image", "query", "target")]
        )
        image, query, target = columns.cpu().numpy()
        source_stage = np.repeat(np.arange(len(pairs)), [len(p) for p in pairs])
        learner = source = np.arange(len(source_stage))
        if leak:
            starts = np.searchsorted(source_stage, np.arange(len(pairs) + 1))
            met = [
                start + np.argwhere(image[start:stop, None] == image[start:stop])
                for start, stop in pairwise(starts)
            ]
            learner, source = np.concatenate(met).T
        return cls(
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
