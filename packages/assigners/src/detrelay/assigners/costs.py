"""Matching costs. Each gives [T, Q]: the cost of matching a target to a query of its image.

Only queries of the target's own image are compared, so the cost of a batch is T x Q, not
(B x Q) x T. Costs are pure functions of detached predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, giou, iou
from detrelay.core.loss_terms import BoxFormat
from detrelay.core.losses import LossConfig, split_weight
from detrelay.core.progress import TrainingProgress
from detrelay.core.registry import find_part, make_part
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
        p = of_classes(prediction.logits, targets).sigmoid()
        return self.weight * _focal_cost(p, self.alpha, self.gamma, self.epsilon)


def _focal_cost(p: Tensor, alpha: float, gamma: float, epsilon: float) -> Tensor:
    positive = -(p + epsilon).log() * alpha * (1 - p) ** gamma
    negative = -(1 - p + epsilon).log() * (1 - alpha) * p**gamma
    return positive - negative


@dataclass(frozen=True, slots=True)
class SoftmaxClassCost:
    """Negative probability of the target's class, softmax over classes and "no object" (logit 0).

    Reference: Carion et al., ECCV 2020.
    """

    weight: float = 1.0

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        p = F.pad(prediction.logits, (0, 1)).softmax(-1)
        return -self.weight * of_classes(p, targets)


@dataclass(frozen=True, slots=True)
class PositionModulatedClassCost:
    """The focal cost of p u^power, where u = (GIoU + 1) / 2, scaled to an image maximum of 1.

    Each pair of query and target has its own u. (In the released code all targets of a class in
    the batch share that of the last one.)

    Attributes:
        weight: factor.
        power: exponent of u.
        alpha: weight of positives.
        gamma: focusing exponent.
        epsilon: added inside the logarithms.
        giou_epsilon: added to the denominators of the GIoU.

    Reference:
        Liu et al., Stable-DINO, ICCV 2023 (arXiv 2304.04742), checked against
        IDEA-Research/Stable-DINO.
    """

    weight: float = 2.0
    power: float = 0.5
    alpha: float = 0.25
    gamma: float = 2.0
    epsilon: float = 1e-8
    giou_epsilon: float = 0.0

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        p = of_classes(prediction.logits, targets).sigmoid()
        fit = self.fit(prediction, targets)
        return self.weight * _focal_cost(p * fit**self.power, self.alpha, self.gamma, self.epsilon)

    def fit(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """How well each box fits, [T, Q], at most 1."""
        u = (_giou_table(prediction, targets, self.giou_epsilon) + 1) / 2
        if not len(targets):
            return u
        best = u.new_zeros(targets.batch_size).scatter_reduce(0, targets.image, u.amax(1), "amax")
        scale = (1 / (best + 1e-8)).clamp(min=1)  # [B]
        return u * scale[targets.image][:, None]


@dataclass(frozen=True, slots=True)
class HighOrderCost:
    """Negative p IoU^power: class and box together.

    Attributes:
        weight: factor.
        power: exponent of the IoU.
        epsilon: added to the denominator of the IoU.

    Reference:
        Pu et al., Rank-DETR, NeurIPS 2023 (arXiv 2310.08854), checked against
        LeapLabTHU/Rank-DETR, which uses it alone in the last quarter of training.
    """

    weight: float = 1.0
    power: float = 4.0
    epsilon: float = 0.0

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        p = of_classes(prediction.logits, targets).sigmoid()
        predicted = of_targets(cxcywh_to_xyxy(prediction.boxes), targets)
        target = cxcywh_to_xyxy(targets.boxes.to(predicted.dtype))[:, None]
        return -self.weight * p * iou(predicted, target, self.epsilon) ** self.power


@dataclass(frozen=True, slots=True)
class L1BoxCost:
    """Sum of the four absolute differences, in units of the image."""

    weight: float = 5.0
    box_format: BoxFormat = "cxcywh"

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        predicted, target = prediction.boxes, targets.boxes
        if self.box_format == "xyxy":
            predicted, target = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target)
        away = [
            (ours - theirs).abs_()
            for ours, theirs in zip(
                of_targets(predicted, targets).unbind(-1), target[:, None].unbind(-1), strict=True
            )
        ]
        return self.weight * (away[0] + away[1] + away[2] + away[3])


@dataclass(frozen=True, slots=True)
class GIoUBoxCost:
    """Negative generalised IoU; for `epsilon` see `boxes.giou`."""

    weight: float = 2.0
    epsilon: float = 0.0

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q]."""
        return -self.weight * _giou_table(prediction, targets, self.epsilon)


def _giou_table(prediction: StagePrediction, targets: Targets, epsilon: float) -> Tensor:
    predicted = of_targets(cxcywh_to_xyxy(prediction.boxes), targets)
    return giou(predicted, cxcywh_to_xyxy(targets.boxes)[:, None], epsilon)


def of_targets(boxes: Tensor, targets: Targets) -> Tensor:
    """The boxes [T, Q, 4] of each target's image, from [B, Q, 4]; coordinates lie apart."""
    return boxes.movedim(-1, 0).contiguous().index_select(1, targets.image).movedim(0, -1)


def of_classes(scores: Tensor, targets: Targets) -> Tensor:
    """The scores [T, Q] of each target's class in its image, from [B, Q, K]."""
    return scores.transpose(1, 2)[targets.image, targets.labels]


@dataclass(frozen=True, slots=True)
class TimedCost:
    """A cost that is active in one part of the training only.

    Attributes:
        cost: the cost.
        start: share of the training after which it is active.
        end: share of the training until which it is active.
        progress: how far training has come.
    """

    cost: MatchingCost
    start: float
    end: float
    progress: TrainingProgress

    def __call__(self, prediction: StagePrediction, targets: Targets) -> Tensor:
        """Weighted cost [T, Q], 0 outside its interval."""
        share = self.progress.share
        if self.start <= share and (share < self.end or self.end == 1):
            return self.cost(prediction, targets)
        return torch.zeros_like(prediction.boxes[targets.image, :, 0])


def default_costs(loss: LossConfig | None = None) -> tuple[MatchingCost, ...]:
    """The costs 2 / 5 / 2 that every head here was published with, in the loss's box format."""
    loss = loss or LossConfig()
    return (
        FocalClassCost(alpha=loss.alpha, gamma=loss.gamma, epsilon=loss.log_epsilon),
        L1BoxCost(box_format=loss.l1_format),
        GIoUBoxCost(epsilon=loss.giou_epsilon),
    )


COSTS: dict[str, type[MatchingCost]] = {
    "focal": FocalClassCost,
    "softmax": SoftmaxClassCost,
    "l1": L1BoxCost,
    "giou": GIoUBoxCost,
    "position_modulated": PositionModulatedClassCost,
    "high_order": HighOrderCost,
}


def build_costs(
    entries: Sequence[Any], loss: LossConfig, progress: TrainingProgress
) -> tuple[MatchingCost, ...]:
    """Costs as a recipe names them; arguments it omits are taken from the head's loss.

    Args:
        entries: each "name", "name:weight", or a mapping with `name`, `weight`, the cost's own
            arguments, and `start` and `end`, shares of the training between which it is active.
            Names are those of `COSTS`, or `module:Class`.
        loss: the head's loss numbers.
        progress: how far training is.

    Raises:
        ValueError: a malformed entry, an unknown name or option, or a start or end outside [0, 1].
    """
    return tuple(_build_cost(entry, loss, progress) for entry in entries)


def _build_cost(entry: Any, loss: LossConfig, progress: TrainingProgress) -> MatchingCost:
    if isinstance(entry, str):
        name, weight = split_weight(entry)
        entry = {"name": name} if weight is None else {"name": name, "weight": weight}
    options = dict(entry) if isinstance(entry, Mapping) else {}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(
            f'a cost must be "name", "name:weight" or a table with a name, found {entry!r}'
        )
    start, end = options.pop("start", 0.0), options.pop("end", 1.0)
    for share in (start, end):
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise ValueError(f"cost {name!r}: start and end must lie in [0, 1], found {share!r}")
    given = _as_in_loss(name, loss) | {"progress": progress}
    part = find_part("cost", name, COSTS)
    cost: MatchingCost = make_part("cost", name, part, options, given, reserved=("progress",))
    if (start, end) == (0.0, 1.0):
        return cost
    return TimedCost(cost, float(start), float(end), progress)


def _as_in_loss(name: str, loss: LossConfig) -> dict[str, Any]:
    """The arguments that a cost shares with its head's loss."""
    focal = {"alpha": loss.alpha, "gamma": loss.gamma, "epsilon": loss.log_epsilon}
    shared: dict[str, dict[str, Any]] = {
        "focal": focal,
        "position_modulated": focal | {"giou_epsilon": loss.giou_epsilon},
        "l1": {"box_format": loss.l1_format},
        "giou": {"epsilon": loss.giou_epsilon},
        "high_order": {"epsilon": loss.giou_epsilon},
    }
    return shared.get(name, {})
