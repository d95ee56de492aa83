"""The losses of a stage: box losses, and the numbers from which the terms of a head are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, giou
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.class_losses import FocalClassLoss as FocalClassLoss
from detrelay.core.class_losses import sigmoid_focal_loss as sigmoid_focal_loss
from detrelay.core.loss_terms import PAIRS, BoxFormat, Divisor, LossTerm, Normalizers, paired_boxes
from detrelay.core.loss_terms import class_targets as class_targets
from detrelay.core.registry import find_part, make_part
from detrelay.core.structures import Assignment, StagePrediction, Targets

# Bias with which class scores of heads start: an object of a class has probability 0.01 (Lin et
# al., ICCV 2017, section 4.1), so that the many empty queries do not drown the first steps.
CLASS_PRIOR_BIAS = -4.59511985013459


@dataclass(frozen=True, slots=True)
class L1BoxLoss:
    """Sum of the four absolute differences of paired boxes, in units of the image.

    Attributes:
        box_format: "cxcywh" (DETR and its children) or "xyxy" (Sparse R-CNN's family, to which
            StageInteractor belongs).
        divisor: what the sum is divided by.
    """

    weight: float = 5.0
    box_format: BoxFormat = "cxcywh"
    name: str = "l1"
    divisor: Divisor = PAIRS

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Weighted sum over pairs and coordinates / divisor."""
        predicted, wanted = paired_boxes(prediction, targets, assignment.boxes)
        if self.box_format == "xyxy":
            predicted, wanted = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted)
        distance = (predicted - wanted).abs()
        if assignment.boxes.weight is not None:
            distance = distance * assignment.boxes.weights(distance)[:, None]
        return distance.sum() / normalizers.of(self.divisor)


@dataclass(frozen=True, slots=True)
class GIoUBoxLoss:
    """Sum of 1 - GIoU of paired boxes; for `epsilon` see `boxes.giou`."""

    weight: float = 2.0
    epsilon: float = 0.0
    name: str = "giou"
    divisor: Divisor = PAIRS

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Weighted sum over pairs / divisor."""
        predicted, wanted = paired_boxes(prediction, targets, assignment.boxes)
        overlap = giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted), self.epsilon)
        distance = 1 - overlap
        if assignment.boxes.weight is not None:
            distance = distance * assignment.boxes.weights(distance)
        return distance.sum() / normalizers.of(self.divisor)


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The numbers of a head's training loss; each head names its published ones.

    A divisor is "targets", "pairs" or "larger", or one of them times a number as in "targets*6";
    see `Divisor`. None is the term's own.

    Attributes:
        class_weight: factor of the class loss.
        l1_weight: factor of the L1 box loss.
        giou_weight: factor of the GIoU box loss.
        l1_format: box format in which the L1 loss and the L1 matching cost are taken.
        alpha: weight of positives in the focal loss and cost; negatives get 1 - alpha.
        gamma: exponent of the focal loss and cost.
        giou_epsilon: added to the denominators of IoU and GIoU, in losses and matching costs.
        log_epsilon: added inside the logarithms of the class matching cost.
        class_loss: entry of `CLASS_LOSSES`, or `module:Class` of one's own.
        class_options: arguments of the class loss, such as `power`.
        class_divisor: divisor of the class loss.
        l1_divisor: divisor of the L1 box loss.
        giou_divisor: divisor of the GIoU box loss.
        more: further losses of one's own, `module:Class` or `module:Class:weight`.
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    l1_format: BoxFormat = "cxcywh"
    alpha: float = 0.25
    gamma: float = 2.0
    giou_epsilon: float = 0.0
    log_epsilon: float = 1e-12
    class_loss: str = "focal"
    class_options: Mapping[str, Any] = field(default_factory=dict)
    class_divisor: str | None = None
    l1_divisor: str | None = None
    giou_divisor: str | None = None
    more: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"loss.{entry.name} must be a number from 0 on, found {value:g}")
        if self.alpha > 1:
            raise ValueError(f"loss.alpha must be a share, 0 to 1, found {self.alpha:g}")

    def terms(self) -> tuple[LossTerm, ...]:
        """The terms of DETR-like training: class loss, L1, GIoU, and further ones.

        Raises:
            ValueError: an unknown loss, option or divisor, or a combination that cannot be.
        """
        return (
            self._class_term(),
            L1BoxLoss(self.l1_weight, self.l1_format, divisor=_divisor(self.l1_divisor, PAIRS)),
            GIoUBoxLoss(
                self.giou_weight, self.giou_epsilon, divisor=_divisor(self.giou_divisor, PAIRS)
            ),
            *(self._own_term(text) for text in self.more),
        )

    def _class_term(self) -> LossTerm:
        part = find_part("class loss", self.class_loss, CLASS_LOSSES)
        given: dict[str, Any] = {"weight": self.class_weight, "epsilon": self.giou_epsilon}
        if self.class_loss == "focal":
            given |= {"alpha": self.alpha, "gamma": self.gamma}
        if self.class_divisor is not None:
            if self.class_loss == "softmax":
                raise ValueError(
                    "class_divisor: the softmax loss is divided by the sum of its own weights; "
                    "leave class_divisor out"
                )
            given["divisor"] = Divisor.parse(self.class_divisor)
        if self.class_loss in _AIM_AT_BOXES and not (self.l1_weight or self.giou_weight):
            raise ValueError(
                f"class loss {self.class_loss!r} aims at the overlap of boxes, but l1_weight and "
                f"giou_weight are 0, so no loss trains the boxes"
            )
        term: LossTerm = make_part(
            "class loss",
            self.class_loss,
            part,
            self.class_options,
            given,
            reserved=("weight", "name", "divisor"),
        )
        return term

    def _own_term(self, text: str) -> LossTerm:
        name, weight = split_weight(text)
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(f"loss.more: the weight of {name} must be from 0 on, found {weight:g}")
        part = find_part("loss", name, {})
        term: LossTerm = make_part(
            "loss", name, part, {}, {} if weight is None else {"weight": weight}
        )
        return term


_AIM_AT_BOXES = ("varifocal", "matchability", "ia_bce", "position_supervised", "rank_giou")


def split_weight(text: str) -> tuple[str, float | None]:
    """Name and weight of a part written as "name:weight"; the weight may be missing."""
    name, colon, number = text.rpartition(":")
    try:
        return (name, float(number)) if colon else (text, None)
    except ValueError:
        return text, None


def _divisor(text: str | None, default: Divisor) -> Divisor:
    return default if text is None else Divisor.parse(text)
