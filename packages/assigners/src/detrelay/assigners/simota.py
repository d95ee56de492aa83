"""Dynamic-k assignment: how many queries a target gets follows from how well they overlap it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detrelay.assigners.costs import (
    FocalClassCost,
    GIoUBoxCost,
    L1BoxCost,
    MatchingCost,
)
from detrelay.assigners.hungarian import total_cost
from detrelay.assigners.tables import Rows, Table, TableAssigner, overlap_table, rows_of
from detrelay.core.structures import StagePrediction, Targets

_NOT_CENTERED = 100.0  # cost of a query that lies outside a target or far from its centre
_NOWHERE = 10_000.0  # cost of a query that lies in no target and near none
_TAKEN = 100_000.0  # cost added to taken queries while some target has none


class SimOtaAssigner(TableAssigner):
    """Gives target t its k_t cheapest queries, k_t being the sum of its best overlaps.

    A query that several targets take is kept by the cheapest. Then every target that has none gets
    its cheapest query, free ones first. Finally a query has at most one target, so with more
    targets than queries some targets stay unmatched.

    Args:
        costs: terms of the cost; 2 focal, 5 L1 of corners and 2 GIoU if None.
        radius: a query is near a target within this many of its widths and heights.
        best_overlaps: how many overlaps are summed for k_t.

    Raises:
        ValueError: a number out of range.

    Reference:
        Ge et al., OTA, CVPR 2021 (arXiv 2103.14259) and YOLOX (arXiv 2107.08430), in the variant
        of Chen et al., DiffusionDet, ICCV 2023 (arXiv 2211.09788).
    """

    def __init__(
        self,
        costs: Sequence[MatchingCost] | None = None,
        radius: float = 2.5,
        best_overlaps: int = 5,
    ) -> None:
        if radius <= 0:
            raise ValueError(f"radius must be positive, found {radius}")
        if best_overlaps < 1:
            raise ValueError(f"best_overlaps must be 1 or more, found {best_overlaps}")
        corners = (FocalClassCost(), L1BoxCost(box_format="xyxy"), GIoUBoxCost())
        self.costs = tuple(costs) if costs is not None else corners
        self.radius = radius
        self.best_overlaps = best_overlaps

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """Cost, overlap, and 1 where a query is in a target and where it is near; [4, T, Q]."""
        cost = total_cost(self.costs, stage, targets)
        target = targets.boxes.to(stage.boxes.dtype)[:, None]  # [T, 1, 4]
        distance = (stage.boxes[targets.image, :, :2] - target[..., :2]).abs()  # [T, Q, 2]
        inside = (distance < 0.5 * target[..., 2:]).all(-1)
        near = (distance < self.radius * target[..., 2:]).all(-1)
        overlap = overlap_table(stage, targets)
        return torch.stack([cost, overlap, inside.to(cost.dtype), near.to(cost.dtype)])

    def choose(self, tables: Table, stage: int, image: int) -> tuple[Rows, Rows]:
        """The queries of every target."""
        cost, overlap, inside, near = tables
        inside, near = inside > 0, near > 0
        somewhere = (inside | near).any(0)
        cost = cost + _NOT_CENTERED * ~(inside & near) + _NOWHERE * ~somewhere
        taken = _cheapest_of_each(cost, self._sizes(overlap))
        contested = taken.sum(0) > 1
        _keep_cheapest(taken, cost, contested)
        _serve_all(taken, cost, contested)
        query = np.flatnonzero(taken.any(0))
        pairs = rows_of(query, taken[:, query].argmax(0))
        return pairs, pairs

    def _sizes(self, overlap: Table) -> NDArray[np.int64]:
        """How many queries each target takes, [T]."""
        count = min(self.best_overlaps, overlap.shape[1])
        best = np.sort(overlap, axis=1)[:, ::-1][:, :count]
        return np.maximum(best.sum(1).astype(np.int64), 1)


def _cheapest_of_each(cost: Table, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Bool [T, Q], True for the cheapest queries of each target."""
    order = np.argsort(cost, axis=1, kind="stable")
    taken = np.zeros(cost.shape, dtype=bool)
    np.put_along_axis(taken, order, np.arange(cost.shape[1]) < sizes[:, None], axis=1)
    return taken


def _keep_cheapest(taken: NDArray[np.bool_], cost: Table, contested: NDArray[np.bool_]) -> None:
    """Leave contested queries, [Q], to their cheapest target; changes `taken`."""
    query = np.flatnonzero(contested)
    taken[:, query] = False
    taken[cost[:, query].argmin(0), query] = True


def _serve_all(taken: NDArray[np.bool_], cost: Table, contested: NDArray[np.bool_]) -> None:
    """Give every target a query; changes `taken`."""
    cost = cost.copy()
    for _ in range(len(cost)):
        unserved = np.flatnonzero(~taken.any(1))
        if not len(unserved):
            return
        cost[:, taken.any(0)] += _TAKEN
        taken[unserved, cost[unserved].argmin(1)] = True
        if (taken.sum(0) > 1).any():
            _keep_cheapest(taken, cost, contested)
