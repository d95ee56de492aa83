"""One-to-one matching, each stage for itself: the case where stages do not talk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrelay.assigners.costs import MatchingCost, default_costs
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets


class HungarianAssigner:
    """Matches queries to targets at the least total cost, per stage and image.

    Every target gets one query; where an image has more targets than queries, every query gets one
    target and the rest stay unmatched.

    Args:
        costs: terms of the matching cost; their sum is minimised. The published 2 / 5 / 2 costs
            (focal class, L1, GIoU) if None.

    Reference:
        Carion et al., ECCV 2020, equation 1.
    """

    def __init__(self, costs: Sequence[MatchingCost] | None = None) -> None:
        self.costs = tuple(costs) if costs is not None else default_costs()

    @torch.no_grad()
    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        """Match every stage.

        Args:
            stages: S predictions, logits [B, Q, K], boxes [B, Q, 4].
            targets: the objects of the batch.

        Returns:
            One assignment a stage; classes and boxes share their pairs, ordered by target.

        Raises:
            FloatingPointError: a cost is NaN or infinite; names stage and images.
        """
        cost = torch.stack([self._cost(stage, targets) for stage in stages])  # [S, T, Q]
        # one transfer for all stages; scipy works in float64
        cost_cpu = cost.to("cpu", torch.float64).numpy()
        image_cpu = targets.image.cpu().numpy()
        assignments = []
        for index, stage_cost in enumerate(cost_cpu):
            _check_finite(stage_cost, image_cpu, index)
            pairs = _match_images(stage_cost, image_cpu, targets.image)
            assignments.append(Assignment(classes=pairs, boxes=pairs))
        return assignments

    def _cost(self, stage: StagePrediction, targets: Targets) -> Tensor:
        terms = [cost(stage, targets) for cost in self.costs]
        return torch.stack(terms).sum(0)


def _check_finite(cost: np.ndarray, image: np.ndarray, stage: int) -> None:
    bad = ~np.isfinite(cost).all(axis=1)
    if bad.any():
        raise FloatingPointError(
            f"non-finite matching cost in stage {stage}; "
            f"images of the batch: {sorted(set(image[bad].tolist()))}"
        )


def _match_images(cost: np.ndarray, image: np.ndarray, device_image: Tensor) -> Pairs:
    """Match each image's rows of `cost` [T, Q]; pairs come in the order of the targets."""
    query_of_target = np.full(len(image), -1, dtype=np.int64)
    for index in np.unique(image):
        rows = np.flatnonzero(image == index)
        # queries as rows, the orientation of the published code: it settles ties the same way
        queries, order = linear_sum_assignment(cost[rows].T)
        query_of_target[rows[order]] = queries
    matched = torch.from_numpy(np.flatnonzero(query_of_target >= 0)).to(device_image.device)
    query = torch.from_numpy(query_of_target).to(device_image.device)
    return Pairs(image=device_image[matched], query=query[matched], target=matched)
