"""Weights by rank: a target's best-aligned query counts most (Align-DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from detrelay.assigners.repeated import RepeatedAssigner
from detrelay.core.criterion import Assigner
from detrelay.core.loss_terms import task_alignment
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets


class RankWeightedAssigner:
    """Weights the pairs of any base by e^(-rank / tau), rank 0 being a target's best-aligned pair.

    Alignment is p^0.25 IoU^0.75. Class pairs and box pairs are ranked separately; a target's only
    pair has weight 1.

    Args:
        base: gives the pairs; each target twice, in up to half of the queries, if None.
        tau: decay constant of the weights; 1.5 in the released code.
        epsilon: added to the denominator of the IoU.

    Raises:
        ValueError: tau is not positive.

    Reference:
        Cai et al., Align-DETR, BMVC 2024 (arXiv 2304.07527), checked against FelixCaae/AlignDETR.
    """

    def __init__(
        self, base: Assigner | None = None, tau: float = 1.5, epsilon: float = 0.0
    ) -> None:
        if tau <= 0:
            raise ValueError(f"tau must be positive, found {tau}")
        self.base = base if base is not None else RepeatedAssigner(2, max_share=0.5)
        self.tau = tau
        self.epsilon = epsilon

    @torch.no_grad()
    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        """The base's assignment of every stage, with weights."""
        result = []
        for stage, own in zip(stages, self.base(stages, targets), strict=True):
            boxes = self._weighted(own.boxes, stage, targets)
            same = own.classes is own.boxes
            classes = boxes if same else self._weighted(own.classes, stage, targets)
            result.append(Assignment(classes=classes, boxes=boxes))
        return result

    def _weighted(self, pairs: Pairs, stage: StagePrediction, targets: Targets) -> Pairs:
        alignment = task_alignment(stage, targets, pairs, self.epsilon)
        # sorted by target and, within it, from the best pair to the worst
        order = alignment.argsort(descending=True, stable=True)
        order = order[pairs.target[order].argsort(stable=True)]
        sizes = pairs.target.bincount(minlength=len(targets))
        first = sizes.cumsum(0) - sizes  # [T], where a target's pairs begin
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[pairs.target[order]]
        return replace(pairs, weight=(-rank.to(alignment.dtype) / self.tau).exp())
