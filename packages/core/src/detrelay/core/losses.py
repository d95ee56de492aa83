"""The losses of a stage: box losses, and the config from which a head's terms are built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args, get_type_hints

from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, giou
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.class_losses import FocalClassLoss as FocalClassLoss
from detrelay.core.class_losses import sigmoid_focal_loss as sigmoid_focal_loss
from detrelay.core.errors import nearest
from detrelay.core.loss_terms import PAIRS, BoxFormat, Divisor, LossTerm, Normalizers, paired_boxes
from detrelay.core.loss_terms import class_targets as class_targets
from detrelay.core.progress import TrainingProgress
from detrelay.core.registry import find_part, make_part
from detrelay.core.structures import Assignment, StagePrediction, Targets

# Initial bias of class scores: probability 0.01 for each class (Lin et al., ICCV 2017, section
# 4.1), so that the many empty queries do not dominate the first steps.
CLASS_PRIOR_BIAS = -4.59511985013459


@dataclass(frozen=True, slots=True)
class L1BoxLoss:
    """Sum of the four absolute differences of paired boxes, in units of the image.

    Attributes:
        box_format: "cxcywh" (DETR and its descendants) or "xyxy" (Sparse R-CNN's family, to which
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
        predicted, target = paired_boxes(prediction, targets, assignment.boxes)
        if self.box_format == "xyxy":
            predicted, target = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target)
        distance = (predicted - target).abs()
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
        predicted, target = paired_boxes(prediction, targets, assignment.boxes)
        overlap = giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target), self.epsilon)
        distance = 1 - overlap
        if assignment.boxes.weight is not None:
            distance = distance * assignment.boxes.weights(distance)
        return distance.sum() / normalizers.of(self.divisor)


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The numbers of a head's training loss; each head names its published ones.

    A divisor is "targets", "pairs" or "larger", or one of them times a number as in "targets*6";
    see `Divisor`. None is the term's default.

    Attributes:
        class_weight: factor of the class loss.
        l1_weight: factor of the L1 box loss.
        giou_weight: factor of the GIoU box loss.
        l1_format: box format of the L1 loss and the L1 matching cost.
        alpha: weight of positives in the focal loss and cost; negatives get 1 - alpha.
        gamma: exponent of the focal loss and cost.
        giou_epsilon: added to the denominators of IoU and GIoU, in losses and matching costs.
        log_epsilon: added inside the logarithms of the class matching cost.
        class_loss: entry of `CLASS_LOSSES`, or `module:Class` for a custom one.
        class_options: arguments of the class loss, such as `power`.
        class_divisor: divisor of the class loss.
        l1_divisor: divisor of the L1 box loss.
        giou_divisor: divisor of the GIoU box loss.
        extra_losses: custom losses, `module:Class` or `module:Class:weight`.
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
    extra_losses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"loss.{entry.name} must be at least 0, found {value:g}")
        if self.alpha > 1:
            raise ValueError(f"loss.alpha must be a share, 0 to 1, found {self.alpha:g}")

    def terms(self, progress: TrainingProgress | None = None) -> tuple[LossTerm, ...]:
        """The terms of DETR-like training: class loss, L1, GIoU, and extra ones.

        Args:
            progress: how far training has come, for terms whose constructor asks for `progress`.

        Raises:
            ValueError: an unknown loss, option or divisor, or an impossible combination.
        """
        shared: dict[str, Any] = {"progress": progress or TrainingProgress()}
        return (
            self._class_term(shared),
            L1BoxLoss(self.l1_weight, self.l1_format, divisor=_divisor(self.l1_divisor, PAIRS)),
            GIoUBoxLoss(
                self.giou_weight, self.giou_epsilon, divisor=_divisor(self.giou_divisor, PAIRS)
            ),
            *(self._own_term(text, shared) for text in self.extra_losses),
        )

    def _class_term(self, shared: Mapping[str, Any]) -> LossTerm:
        part = find_part("class loss", self.class_loss, CLASS_LOSSES)
        given = {**shared, "weight": self.class_weight, "epsilon": self.giou_epsilon}
        if self.class_loss == "focal":
            given |= {"alpha": self.alpha, "gamma": self.gamma}
        if self.class_divisor is not None:
            if self.class_loss == "softmax":
                raise ValueError(
                    "class_divisor: the softmax loss is divided by the sum of its own weights; "
                    "remove class_divisor"
                )
            given["divisor"] = Divisor.parse(self.class_divisor)
        if self.class_loss in _AIM_AT_BOXES and not (self.l1_weight or self.giou_weight):
            raise ValueError(
                f"class loss {self.class_loss!r} needs the overlap of boxes, but l1_weight and "
                f"giou_weight are 0, so no loss trains the boxes"
            )
        term: LossTerm = make_part(
            "class loss",
            self.class_loss,
            part,
            self.class_options,
            given,
            reserved=("weight", "name", "divisor", "progress"),
        )
        return term

    def _own_term(self, text: str, shared: Mapping[str, Any]) -> LossTerm:
        name, weight = split_weight(text)
        if weight is not None and not 0 <= weight < math.inf:
            raise ValueError(
                f"loss.extra_losses: the weight of {name} must be at least 0, found {weight:g}"
            )
        part = find_part("loss", name, {})
        given = shared if weight is None else {**shared, "weight": weight}
        term: LossTerm = make_part("loss", name, part, {}, given)
        return term


def changed(loss: LossConfig, changes: Mapping[str, Any], table: str = "loss") -> LossConfig:
    """Loss numbers with some of them replaced.

    Args:
        loss: the numbers to start from.
        changes: values by field; "class_options.NAME" sets a single class option.
        table: name of the table of changes in messages.

    Raises:
        ValueError: an unknown key or a value of another type; names the key.
    """
    hints = get_type_hints(LossConfig)
    for key, value in changes.items():
        name, dot, option = key.partition(".")
        if name not in hints or (dot and name != "class_options"):
            hint = nearest(key, hints, lambda known: f"{table}.{known}")
            raise ValueError(f"unknown key {table}.{key}; {hint}")
        if dot:
            value = {**loss.class_options, option: value}
        loss = replace(loss, **{name: _checked(name, value, hints[name], table)})
    return loss


def _checked(name: str, value: Any, hint: Any, table: str) -> Any:
    """The value, converted to its field's type."""
    if name == "l1_format":
        fits, expected = value in get_args(BoxFormat), '"xyxy" or "cxcywh"'
    elif name == "class_options":
        fits, expected = isinstance(value, Mapping), "a table"
    elif name == "extra_losses":
        texts = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
        fits, expected = texts, "a list of strings"
    elif hint is float:
        fits, expected = type(value) in (int, float), "a number"
    else:
        fits, expected = isinstance(value, str), "a string"
    if not fits:
        raise ValueError(f"{table}.{name} must be {expected}, found {value!r}")
    if hint is float:
        return float(value)
    return tuple(value) if name == "extra_losses" else value


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
