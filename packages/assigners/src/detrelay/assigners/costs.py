"""Matching costs. Each gives [T, Q]: what it costs that a query of the target's image answers it.

Only queries of the target's own image are compared, so the cost of a batch is T x Q, not
(B x Q) x T. Costs are pure functions of detached predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, giou
from detrelay.core.loss_terms import BoxFormat
from detrelay.core.losses import LossConfig
from detrelay.core.structures import StagePrediction, Targets


class MatchingCost(Protocol):
    """One term of the matching cost."""

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""


@dataclass(frozen=True, slots=True)
class FocalClassCost:
    """Focal loss of a positive minus that of a negative, at the target's class.

    Attributes:
        weight: factor.
        alpha: weight of positives.
        gamma: focusing exponent.
        epsilon: added inside the logarithms (1e-12 in StageInteractor, 1e-8 in Deformable DETR).
    """

    weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    epsilon: float = 1e-12

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        # gather before the sigmoid: [T, Q] numbers instead of [B, Q, K]
        p = prediction.logits[targets.image, :, targets.labels].sigmoid()
        positive = -(p + self.epsilon).log() * self.alpha * (1 - p) ** self.gamma
        negative = -(1 - p + self.epsilon).log() * (1 - self.alpha) * p**self.gamma
        return self.weight * (positive - negative)


@dataclass(frozen=True, slots=True)
class L1BoxCost:
    """Sum of the four absolute differences, in units of the image."""

    weight: float = 5.0
    box_format: BoxFormat = "cxcywh"

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        predicted, wanted = prediction.boxes[targets.image], targets.boxes[:, None]  # [T, Q, 4]
        if self.box_format == "xyxy":
            predicted, wanted = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        return self.weight * (predicted - wanted).abs().sum(-1)


@dataclass(frozen=True, slots=True)
class GIoUBoxCost:
    """Negative generalised IoU; for `epsilon` see `boxes.giou`."""

    weight: float = 2.0
    epsilon: float = 0.0

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        predicted = cxcywh_to_xyxy(prediction.boxes[targets.image])  # [T, Q, 4]
        return -self.weight * giou(predicted, cxcywh_to_xyxy(targets.boxes)[:, None], self.epsilon)


def default_costs(loss: LossConfig | None = None) -> tuple[MatchingCost, ...]:
    """The costs 2 / 5 / 2 that every head here was published with, in the loss's box format."""
    loss = loss or LossConfig()
    return (
        FocalClassCost(alpha=loss.alpha, gamma=loss.gamma, epsilon=loss.log_epsilon),
        L1BoxCost(box_format=loss.l1_format),
        GIoUBoxCost(epsilon=loss.giou_epsilon),
    )
