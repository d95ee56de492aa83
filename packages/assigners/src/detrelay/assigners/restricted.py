"""Restricted matching: one-to-one classes, within the queries whose box fits (TSP-RCNN)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detrelay.assigners.costs import GIoUBoxCost, MatchingCost, SoftmaxClassCost
from detrelay.assigners.hungarian import total_cost
from detrelay.assigners.tables import (
    BoxSource,
    Rows,
    Table,
    TableAssigner,
    check_box_source,
    overlap_table,
    rows_of,
    with_boxes,
)
from detrelay.core.structures import StagePrediction, Targets


class RestrictedAssigner(TableAssigner):
    """The cheapest candidate of a target learns its class, all candidates learn its box.

    Candidates of a target are queries that overlap it by `threshold` or more, and no other target
    by more. A target without candidates stays unmatched.

    Args:
        threshold: minimum overlap of a candidate.
        costs: which candidate is the cheapest; 1 softmax and 2 GIoU if None.
        boxes: whose overlap makes a candidate: the "predicted" boxes', or the stage's "references"
            (the proposals, in TSP-RCNN). Costs always use the predicted boxes.

    Raises:
        ValueError: a threshold outside (0, 1] or an unknown choice of boxes.

    Reference:
        Sun et al., ICCV 2021 (arXiv 2011.10881), checked against Edward-Sun/TSP-Detection.
    """

    def __init__(
        self,
        threshold: float = 0.5,
        costs: Sequence[MatchingCost] | None = None,
        boxes: BoxSource = "predicted",
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], found {threshold}")
        check_box_source(boxes)
        self.threshold = threshold
        self.costs = tuple(costs) if costs is not None else (SoftmaxClassCost(), GIoUBoxCost())
        self.boxes = boxes

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """Overlap and cost, [2, T, Q]."""
        overlap = overlap_table(with_boxes(stage, self.boxes), targets)
        return torch.stack([overlap, total_cost(self.costs, stage, targets)])

    def choose(self, tables: Table, stage: int, image: int) -> tuple[Rows, Rows]:
        """Candidates and the cheapest of each target."""
        overlap, cost = tables
        owner = overlap.argmax(0)
        query = np.flatnonzero(overlap.max(0) >= self.threshold)
        boxes = rows_of(query, owner[query])
        candidate = np.zeros(cost.shape, dtype=bool)
        candidate[boxes[:, 1], boxes[:, 0]] = True
        target = np.flatnonzero(candidate.any(1))
        cheapest = np.where(candidate, cost, np.inf)[target].argmin(1)
        return rows_of(cheapest, target), boxes
