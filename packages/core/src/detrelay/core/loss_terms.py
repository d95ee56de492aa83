"""Loss terms: their interface, their divisor, and shared functions.

A term is a small frozen object with a `name`, the last part of its loss key, a `weight`, by which
the criterion multiplies it in the total, and usually a `divisor`. It takes (prediction, targets,
assignment, normalisers) and gives a scalar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from detrelay.core.boxes import cxcywh_to_xyxy, giou, iou
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets

BoxFormat = Literal["xyxy", "cxcywh"]
Count = Literal["targets", "pairs", "larger", "own"]


@dataclass(frozen=True, slots=True)
class Divisor:
    """What a loss is divided by.

    Attributes:
        count: "targets", the objects, matched or not (of a group with known pairs, those pairs);
            "pairs", the box pairs; "larger", the larger of box pairs and positive class entries;
            "own", a count that the term makes itself.
        times: factor of the count, such as the number of copies of every target.
    """

    count: Count
    times: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Divisor:
        """Read "targets", "pairs", "larger", or one of them times a number, as in "targets*6".

        Raises:
            ValueError: it is none of these.
        """
        count, star, times = text.partition("*")
        allowed = [name for name in get_args(Count) if name != "own"]
        try:
            factor = float(times) if star else 1.0
        except ValueError:
            factor = 0.0
        if count not in allowed or not 0 < factor < float("inf"):
            raise ValueError(
                f"a divisor must be {', '.join(allowed)}, or one of these times a positive number "
                f'as in "targets*6"; found {text!r}'
            )
        return cls(count, factor)  # type: ignore[arg-type]


LARGER, PAIRS, OWN = Divisor("larger"), Divisor("pairs"), Divisor("own")


@dataclass(frozen=True, slots=True)
class Normalizers:
    """Divisors of one stage, from counts of a whole update.

    Attributes:
        positives: scalar; positive class entries.
        pairs: scalar; box pairs.
        targets: scalar; objects.
        own: scalar; a count that the group's class loss makes itself.
        num_processes: gradients are averaged over them, so divisors are smaller by this factor.
    """

    positives: Tensor
    pairs: Tensor
    targets: Tensor
    own: Tensor
    num_processes: int = 1

    def of(self, divisor: Divisor) -> Tensor:
        """The scalar that a loss with this divisor is divided by."""
        if divisor.count == "own":
            return self.own.clamp(min=torch.finfo(self.own.dtype).tiny) / self.num_processes
        count = {"targets": self.targets, "pairs": self.pairs}.get(divisor.count)
        if count is None:
            count = torch.maximum(self.pairs, self.positives)
        return (count * divisor.times).clamp(min=1) / self.num_processes

    @property
    def classes(self) -> Tensor:
        """Scalar; the larger of box pairs and positive class entries."""
        return self.of(LARGER)

    @property
    def boxes(self) -> Tensor:
        """Scalar; box pairs."""
        return self.of(PAIRS)


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


@runtime_checkable
class CountingTerm(Protocol):
    """A term that is divided by a count of its own; at most one in a group."""

    def count(
        self, prediction: StagePrediction, targets: Targets, assignment: Assignment
    ) -> Tensor:
        """What this batch contributes to `Normalizers.own`, a scalar."""


def class_targets(prediction: StagePrediction, targets: Targets, pairs: Pairs) -> Tensor:
    """Multi-hot class targets [B, Q, K]: one where some pair gives the query that class."""
    result = torch.zeros_like(prediction.logits)
    result[pairs.image, pairs.query, targets.labels[pairs.target]] = 1
    return result


def score_targets(
    prediction: StagePrediction, targets: Targets, pairs: Pairs, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Class targets other than one.

    Args:
        prediction: for the shape.
        targets: the objects.
        pairs: who learns which class.
        scores: [M], target score of each pair; of several for one entry the highest counts.

    Returns:
        Target scores [B, Q, K], and bool [B, Q, K], True where some pair names the entry (its
        score may be 0).
    """
    positive = class_targets(prediction, targets, pairs) > 0
    _, num_queries, num_classes = prediction.logits.shape
    entry = (pairs.image * num_queries + pairs.query) * num_classes + targets.labels[pairs.target]
    target_scores = torch.zeros_like(prediction.logits).flatten()
    target_scores = target_scores.scatter_reduce(0, entry, scores.to(target_scores.dtype), "amax")
    return target_scores.view_as(positive), positive


def paired_boxes(
    prediction: StagePrediction, targets: Targets, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """Predicted and target boxes [M, 4] of pairs, cxcywh."""
    predicted = prediction.boxes[pairs.image, pairs.query]
    return predicted, targets.boxes[pairs.target].to(predicted.dtype)


@torch.no_grad()
def paired_overlap(
    prediction: StagePrediction,
    targets: Targets,
    pairs: Pairs,
    epsilon: float = 0.0,
    generalized: bool = False,
) -> Tensor:
    """IoU or GIoU [M] of the predicted box of each pair with its target, without gradient."""
    predicted, target = map(cxcywh_to_xyxy, paired_boxes(prediction, targets, pairs))
    return (giou if generalized else iou)(predicted, target, epsilon)


@torch.no_grad()
def task_alignment(
    prediction: StagePrediction, targets: Targets, pairs: Pairs, epsilon: float = 0.0
) -> Tensor:
    """How well score and box of a pair agree with its target, p^0.25 IoU^0.75, minimum 0.01; [M].

    Reference: Cai et al., Align-DETR, BMVC 2024 (arXiv 2304.07527); FelixCaae/AlignDETR.
    """
    labels = targets.labels[pairs.target]
    p = prediction.logits[pairs.image, pairs.query, labels].sigmoid()
    overlap = paired_overlap(prediction, targets, pairs, epsilon)
    return (p**0.25 * overlap**0.75).clamp(min=0.01)
