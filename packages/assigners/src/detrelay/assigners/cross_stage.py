"""Cross-stage labels: class labels are gathered over stages, boxes stay one-to-one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from detrelay.assigners.hungarian import HungarianAssigner
from detrelay.assigners.rank_weighted import RankWeightedAssigner
from detrelay.core.boxes import cxcywh_to_xyxy, iou
from detrelay.core.criterion import Assigner
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

Scope = Literal["all", "early", "late"]
Window = tuple[int | None, int | None]


class CrossStageAssigner:
    """StageInteractor's label assigner, on top of any assigner that works stage by stage.

    A query of stage i learns the class of a target if the same query answers that target in some
    stage j of the window around i, and its box *of stage i* overlaps the target well enough. So a
    label travels along one query index only, a query may learn several classes, and one whose own
    match is loose learns none. Box regression keeps each stage's own matching.

    Args:
        base: gives every stage's own pairs; Hungarian matching if None.
        window: first and last offset j - i of the stages that hand on labels, None for no limit on
            that side; must hold 0. (-1, None), the released setting: the stage before, the stage
            itself and all later ones.
        iou_threshold: minimum overlap of the current stage's box with the target; one value for all
            stages or one per stage.
        inclusive: an overlap equal to the threshold counts, as in the released StageInteractor;
            the paper's figure 5 writes "greater than", and so do the released Deformable DETR
            variant and our recipes of its kin, see `DeformableForObjectDetection`.
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
            raise ValueError(f"window must hold offset 0, the stage itself; found {window}")
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
            that several stages agree on stands once.

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
        return [
            Assignment(classes=self._classes(index, stages[index], own, targets), boxes=pairs.boxes)
            if self._serves(index, count)
            else pairs
            for index, pairs in enumerate(own)
        ]

    def _serves(self, index: int, count: int) -> bool:
        if self.scope == "all":
            return True
        return (index < count // 2) == (self.scope == "early")

    def _classes(
        self, index: int, stage: StagePrediction, own: Sequence[Assignment], targets: Targets
    ) -> Pairs:
        first, last = self.window
        start = 0 if first is None else max(0, index + first)
        stop = len(own) if last is None else min(len(own), index + last + 1)
        kept = []
        for source_stage in range(start, stop):
            pairs = own[source_stage].classes
            predicted = cxcywh_to_xyxy(stage.boxes[pairs.image, pairs.query])
            target = cxcywh_to_xyxy(targets.boxes[pairs.target]).to(predicted.dtype)
            if source_stage == index and self.keep_own:
                kept.append(pairs)
            else:
                kept.append(pairs.select(self._passes(index, iou(predicted, target))))
            if self.leak:
                near = self._passes(index, iou(predicted, target[:, None]))
                learner, source = (near & (pairs.image[:, None] == pairs.image)).nonzero().unbind(1)
                kept.append(Pairs(pairs.image[learner], pairs.query[learner], pairs.target[source]))
        return _distinct(Pairs.cat(kept))

    def _passes(self, index: int, overlap: torch.Tensor) -> torch.Tensor:
        threshold = self.thresholds[index if len(self.thresholds) > 1 else 0]
        return overlap >= threshold if self.inclusive else overlap > threshold


def _distinct(pairs: Pairs) -> Pairs:
    """Each pair once, ordered by target and query."""
    rows = torch.stack([pairs.target, pairs.query, pairs.image], dim=1).unique(dim=0)
    return Pairs(image=rows[:, 2], query=rows[:, 1], target=rows[:, 0])
