"""Boxes that stages share: every stage regresses what any stage has matched (D-FINE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detrelay.assigners.hungarian import HungarianAssigner
from detrelay.core.criterion import Assigner
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets


class UnionAssigner:
    """Box pairs are the union over all stages, class pairs stay each stage's own.

    In the union a query keeps the target that most stages gave it, the first in the list of targets
    in case of a tie; a target may have several queries. Divide box losses by box pairs, and class
    losses by "targets": the union has many more pairs than objects.

    Args:
        base: gives every stage's own pairs; Hungarian matching if None.

    Reference:
        Peng et al., D-FINE, ICLR 2025 (arXiv 2410.13842), checked against Peterande/D-FINE, whose
        sort breaks ties arbitrarily.
    """

    def __init__(self, base: Assigner | None = None) -> None:
        self.base = base if base is not None else HungarianAssigner()

    @torch.no_grad()
    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        """Assign every stage.

        Args:
            stages: S predictions, logits [B, Q, K], boxes [B, Q, 4].
            targets: the objects of the batch.

        Returns:
            One assignment per stage; all share their box pairs.
        """
        own = self.base(stages, targets)
        boxes = most_voted(
            [assignment.boxes for assignment in own], stages[0].logits.shape[1], len(targets)
        )
        return [Assignment(classes=assignment.classes, boxes=boxes) for assignment in own]


def most_voted(parts: Sequence[Pairs], num_queries: int, num_targets: int) -> Pairs:
    """Of the targets that `parts` give a query, the most frequent one, for every such query."""
    votes = Pairs.cat([Pairs(part.image, part.query, part.target) for part in parts])
    slot = votes.image * num_queries + votes.query
    keys, counts = (slot * num_targets + votes.target).unique(return_counts=True)
    # the larger count wins, then the smaller target
    rank = counts * num_targets + (num_targets - 1 - keys % max(num_targets, 1))
    slots, place = (keys // max(num_targets, 1)).unique(return_inverse=True)
    best = rank.new_zeros(len(slots)).scatter_reduce(0, place, rank, "amax")
    target = num_targets - 1 - best % max(num_targets, 1)
    return Pairs(image=slots // num_queries, query=slots % num_queries, target=target)
