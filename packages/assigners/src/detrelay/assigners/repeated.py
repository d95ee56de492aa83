"""One-to-many matching: Hungarian matching with every target repeated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detrelay.assigners.costs import MatchingCost, default_costs
from detrelay.assigners.hungarian import minimum_cost_pairs, total_cost
from detrelay.assigners.tables import Rows, Table, TableAssigner, rows_of
from detrelay.core.structures import Assignment, StagePrediction, Targets


class RepeatedAssigner(TableAssigner):
    """Matches k queries to every target at minimum total cost, per stage and image.

    Where an image has too few queries for all copies, every query gets a target.

    Args:
        times: k, one for all stages or one per stage.
        max_share: limits k per image so that at most this share of its queries is matched, but not
            below 1; None for no limit. 0.5 in Align-DETR.
        costs: terms of the matching cost; the published 2 / 5 / 2 if None.

    Raises:
        ValueError: a k below 1 or a share outside (0, 1].

    Reference:
        Jia et al., H-DETR, CVPR 2023 (arXiv 2207.13080), checked against
        HDETR/H-Deformable-DETR; Cai et al., Align-DETR (arXiv 2304.07527), checked against
        FelixCaae/AlignDETR, where a limit lowered by a crowded image stays lowered for later ones.
    """

    def __init__(
        self,
        times: int | Sequence[int] = 6,
        max_share: float | None = None,
        costs: Sequence[MatchingCost] | None = None,
    ) -> None:
        self.times = (times,) if isinstance(times, int) else tuple(times)
        if not self.times or any(not isinstance(k, int) or k < 1 for k in self.times):
            raise ValueError(f"times must be 1 or more, found {times}")
        if max_share is not None and not 0 < max_share <= 1:
            raise ValueError(f"max_share must lie in (0, 1], found {max_share}")
        self.max_share = max_share
        self.costs = tuple(costs) if costs is not None else default_costs()

    @torch.no_grad()
    def assign_groups(
        self, groups: Sequence[Sequence[StagePrediction]], targets: Targets
    ) -> list[list[Assignment]]:
        """Assign every stage of every group; see `TableAssigner`.

        Raises:
            ValueError: there are neither one nor S values of `times`.
        """
        for stages in groups:
            if len(self.times) not in (1, len(stages)):
                raise ValueError(
                    f"times has {len(self.times)} values for {len(stages)} stages; give one, or "
                    f"one per stage"
                )
        return super().assign_groups(groups, targets)

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        """The total cost, [1, T, Q]."""
        return total_cost(self.costs, stage, targets)[None]

    def choose(self, tables: Table, stage: int, image: int) -> tuple[Rows, Rows]:
        """Up to k queries for each target."""
        num_targets, num_queries = tables.shape[1:]
        times = self.times[stage if len(self.times) > 1 else 0]
        if self.max_share is not None:
            times = max(1, min(times, int(num_queries * self.max_share / num_targets)))
        copies = minimum_cost_pairs(np.tile(tables[0], (times, 1)))
        query, target = copies[:, 0], copies[:, 1] % num_targets
        order = np.argsort(target, kind="stable")
        pairs = rows_of(query[order], target[order])
        return pairs, pairs
