"""Assignment by overlap alone, as in two-stage detectors (DETA; Faster R-CNN)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners.owners import OwnerAssigner
from detrelay.assigners.tables import Table, check_box_source, overlap_table, with_boxes
from detrelay.core.structures import Assignment, StagePrediction, Targets

Judged = Literal["predicted", "references", "initial"]


class IoUAssigner(OwnerAssigner):
    """Gives a target up to `at_most` queries whose boxes overlap it well.

    A query is positive where its best overlap reaches `threshold` or, with `best_of_target`, no
    query overlaps some target more; see `OwnerAssigner` for how positives become pairs. Faster
    R-CNN's rule for its second stage is `threshold` 0.5 and `best_of_target` False, for its
    proposals 0.7 and True, both with `at_most` None and `max_positives` 0.

    Args:
        threshold: 0.6 for the decoder, 0.7 for proposals in DETA.
        at_most: maximum queries per target; None gives every positive query to its owner instead.
        max_positives: maximum positive queries per image; None for a quarter of the queries, 0 for
            no limit. 128 for proposals in DETA.
        best_of_target: see above. A target that nothing overlaps makes no query positive (in the
            released code it makes positive all that overlap it by 0).
        one_class: a query that serves several targets learns the class of the best one only.
        boxes: whose overlap: the "predicted" boxes', the stage's "references", or the "initial"
            references of the first stage for all stages (DETA).

    Raises:
        ValueError: a number out of range or an unknown choice of boxes.

    Reference:
        Ouyang-Zhang et al., DETA (arXiv 2212.06137), checked against jozhang97/DETA; Ren et al.,
        Faster R-CNN, NeurIPS 2015, checked against torchvision's `Matcher`.
    """

    def __init__(
        self,
        threshold: float = 0.6,
        at_most: int | None = 4,
        max_positives: int | None = None,
        best_of_target: bool = True,
        one_class: bool = True,
        boxes: Judged = "predicted",
    ) -> None:
        super().__init__(threshold, at_most, max_positives, one_class)
        check_box_source(boxes, ("predicted", "references", "initial"))
        self.best_of_target = best_of_target
        self.boxes = boxes

    @torch.no_grad()
    def assign_groups(
        self, groups: Sequence[Sequence[StagePrediction]], targets: Targets
    ) -> list[list[Assignment]]:
        """Assign every stage of every group; see `TableAssigner`."""
        if self.boxes != "initial":
            return super().assign_groups(groups, targets)
        first = [
            replace(group[0], boxes=with_boxes(group[0], self.boxes).boxes) for group in groups
        ]
        found = super().assign_groups([[stage] for stage in first], targets)
        return [own * len(group) for own, group in zip(found, groups, strict=True)]

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """The overlap, [1, T, Q]."""
        return overlap_table(with_boxes(stage, self.boxes), targets)[None]

    def positives(self, score: Table) -> NDArray[np.bool_]:
        """Overlaps enough, or is the best of some target that it overlaps at all."""
        positive: NDArray[np.bool_] = score.max(0) >= self.threshold
        if self.best_of_target:
            positive |= ((score == score.max(1, keepdims=True)) & (score > 0)).any(0)
        return positive
