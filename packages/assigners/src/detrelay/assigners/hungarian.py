"""One-to-one matching, each stage on its own: the case where stages do not talk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrelay.assigners.costs import MatchingCost, default_costs
from detrelay.assigners.tables import (
    BoxSource,
    Rows,
    Table,
    TableAssigner,
    check_box_source,
    rows_of,
    with_boxes,
)
from detrelay.core.structures import StagePrediction, Targets


def total_cost(costs: Sequence[MatchingCost], stage: StagePrediction, targets: Targets) -> Tensor:
    """The sum [T, Q] of all costs."""
    return torch.stack([cost(stage, targets) for cost in costs]).sum(0)


def minimum_cost_pairs(cost: Table) -> Rows:
    """The pairs of minimum total cost of one table [T, Q], in the order of the targets."""
    # Published code has queries as rows, which settles ties. scipy works on the shorter side, so
    # only a square table need be turned for the same pairs.
    num_targets, num_queries = cost.shape
    if num_targets == num_queries:
        query, target = linear_sum_assignment(cost.T)
        order = np.argsort(target, kind="stable")
        return rows_of(query[order], target[order])
    target, query = linear_sum_assignment(cost)
    return rows_of(query, target)


class HungarianAssigner(TableAssigner):
    """The Hungarian matcher of DETR: matches queries to targets at minimum total cost.

    Matching is bipartite, per stage (decoder layer) and image. Every target gets one query; where
    an image has more targets than queries, every query gets one target and the rest stay unmatched:
    min(Q, T) pairs. Classes and boxes share their pairs, ordered by target.

    Args:
        costs: terms of the matching cost; their sum is minimised. The published 2 / 5 / 2 costs
            (focal class, L1, GIoU) if None.
        boxes: the boxes in the costs: "predicted", or the stage's "references" (the proposals of
            MS-DETR are matched by their anchors).

    Raises:
        ValueError: an unknown choice of boxes.

    Reference:
        Carion et al., ECCV 2020, equation 1.
    """

    def __init__(
        self, costs: Sequence[MatchingCost] | None = None, boxes: BoxSource = "predicted"
    ) -> None:
        check_box_source(boxes)
        self.costs = tuple(costs) if costs is not None else default_costs()
        self.boxes = boxes

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """The total cost, [1, T, Q]."""
        return total_cost(self.costs, with_boxes(stage, self.boxes), targets)[None]

    def choose(self, tables: Table, stage: int, image: int) -> tuple[Rows, Rows]:
        """One query for each target."""
        pairs = minimum_cost_pairs(tables[0])
        return pairs, pairs
