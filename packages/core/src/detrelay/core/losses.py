"""Loss terms: each takes (prediction, targets, assignment, normalisers) and gives a scalar.

A term is a small frozen object with a `name`, the last part of its loss key, and a `weight`, by
which the criterion multiplies it in the total. A head with an output of its own adds a term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, giou
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

BoxFormat = Literal["xyxy", "cxcywh"]


@dataclass(frozen=True, slots=True)
class Normalizers:
    """Divisors of one stage: counts of a whole update over the number of processes.

    Attributes:
        classes: scalar; the larger of box pairs and positive class entries.
        boxes: scalar; box pairs.
    """

    classes: Tensor
    boxes: Tensor


class LossTerm(Protocol):
    """One named loss of a stage."""

    @property
    def name(self) -> str:
        """Last part of the loss key, such as "giou"."""

    @property
    def weight(self) -> float:
        """Factor in the weighted total."""

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """The unweighted loss, a scalar that depends on the prediction even without targets."""


def class_targets(prediction: StagePrediction, targets: Targets, pairs: Pairs) -> Tensor:
    """Multi-hot class targets [B, Q, K]: one where some pair gives the query that class."""
    result = torch.zeros_like(prediction.logits)
    result[pairs.image, pairs.query, targets.labels[pairs.target]] = 1
    return result


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of every entry, same shape as `logits`; `targets` in {0, 1}.

    Reference: Lin et al., ICCV 2017, equation 5.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    wrongness = targets + probability - 2 * targets * probability  # 1 - p of the true side
    balance = targets * alpha + (1 - targets) * (1 - alpha)
    return balance * wrongness**gamma * cross_entropy


@dataclass(frozen=True, slots=True)
class FocalClassLoss:
    """Sigmoid focal loss over all queries and classes, divided by the class normaliser."""

    weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    name: str = "class"

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / normaliser."""
        wanted = class_targets(prediction, targets, assignment.classes)
        loss = sigmoid_focal_loss(prediction.logits, wanted, self.alpha, self.gamma)
        return loss.sum() / normalizers.classes


def _paired_boxes(
    prediction: StagePrediction, targets: Targets, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    predicted = prediction.boxes[pairs.image, pairs.query]  # [M, 4]
    return predicted, targets.boxes[pairs.target].to(predicted.dtype)


@dataclass(frozen=True, slots=True)
class L1BoxLoss:
    """Sum of the four absolute differences of paired boxes, in units of the image.

    Attributes:
        box_format: "cxcywh" (DETR and its children) or "xyxy" (Sparse R-CNN's family, to which
            StageInteractor belongs).
    """

    weight: float = 5.0
    box_format: BoxFormat = "cxcywh"
    name: str = "l1"

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over pairs and coordinates / normaliser."""
        predicted, wanted = _paired_boxes(prediction, targets, assignment.boxes)
        if self.box_format == "xyxy":
            predicted, wanted = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        return (predicted - wanted).abs().sum() / normalizers.boxes


@dataclass(frozen=True, slots=True)
class GIoUBoxLoss:
    """Sum of 1 - GIoU of paired boxes; for `epsilon` see `boxes.giou`."""

    weight: float = 2.0
    epsilon: float = 0.0
    name: str = "giou"

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over pairs / normaliser."""
        predicted, wanted = _paired_boxes(prediction, targets, assignment.boxes)
        overlap = giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted), self.epsilon)
        return (1 - overlap).sum() / normalizers.boxes


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The numbers of a head's training loss; each head names its published ones.

    Attributes:
        class_weight: factor of the focal classification loss.
        l1_weight: factor of the L1 box loss.
        giou_weight: factor of the GIoU box loss.
        l1_format: box format in which the L1 loss and the L1 matching cost are taken.
        alpha: weight of positives in the focal loss; negatives get 1 - alpha.
        gamma: exponent of the focal loss.
        giou_epsilon: added to the denominators of GIoU, in the loss and in the matching cost.
        log_epsilon: added inside the logarithms of the class matching cost.
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    l1_format: BoxFormat = "cxcywh"
    alpha: float = 0.25
    gamma: float = 2.0
    giou_epsilon: float = 0.0
    log_epsilon: float = 1e-12

    def terms(self) -> tuple[LossTerm, ...]:
        """The three terms of DETR-like training."""
        return (
            FocalClassLoss(self.class_weight, self.alpha, self.gamma),
            L1BoxLoss(self.l1_weight, self.l1_format),
            GIoUBoxLoss(self.giou_weight, self.giou_epsilon),
        )
