"""Class losses by name: the one place to register a new one.

Each entry of the logits [B, Q, K] is positive, where a pair gives the query that class, or
negative. The losses differ in the target score y of a positive, and in the weights of the entries:

    positive: a m(p, y) BCE(logit, y)        negative: b p^gamma BCE(logit, 0)

The weight of a class pair multiplies its y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.loss_terms import (
    LARGER,
    OWN,
    Divisor,
    LossTerm,
    Normalizers,
    class_targets,
    paired_overlap,
    score_targets,
    task_alignment,
)
from detrelay.core.structures import Assignment, Pairs, StagePrediction, Targets


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of every entry, same shape as `logits`; `targets` in {0, 1}.

    Reference: Lin et al., ICCV 2017, equation 5.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probability = logits.sigmoid()
    error = targets + probability - 2 * targets * probability  # 1 - p of the correct side
    balance = targets * alpha + (1 - targets) * (1 - alpha)
    return balance * error**gamma * cross_entropy


def score_gap_loss(
    logits: Tensor, target_scores: Tensor, positive: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Focal loss with target scores in [0, 1]: the gap |y - p| replaces 1 - p."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none")
    balance = torch.where(positive, alpha, 1 - alpha)
    return balance * (target_scores - logits.sigmoid()).abs() ** gamma * cross_entropy


def weighted_entropy(logits: Tensor, target_scores: Tensor, weights: Tensor) -> Tensor:
    """Sum of every entry's binary cross entropy times its weight."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target_scores, reduction="none")
    return (weights * cross_entropy).sum()


@dataclass(frozen=True, slots=True)
class FocalClassLoss:
    """Sigmoid focal loss over all queries and classes.

    Attributes:
        weight: factor in the total.
        alpha: weight of positives; negatives get 1 - alpha.
        gamma: focusing exponent.
        divisor: what the sum is divided by.
    """

    weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    name: str = "class"
    divisor: Divisor = LARGER

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / divisor."""
        pairs, logits = assignment.classes, prediction.logits
        if pairs.weight is None:
            target_scores = class_targets(prediction, targets, pairs)
            loss = sigmoid_focal_loss(logits, target_scores, self.alpha, self.gamma)
        else:
            scores = score_targets(prediction, targets, pairs, pairs.weight)
            loss = score_gap_loss(logits, *scores, self.alpha, self.gamma)
        return loss.sum() / normalizers.of(self.divisor)


@dataclass(frozen=True, slots=True)
class SoftmaxClassLoss:
    """Cross entropy of a softmax over the classes and "no object", whose logit is always 0.

    A query with several classes shares its probability among them in proportion to the weights of
    the pairs. The loss is divided by the sum of the queries' weights, over all processes of an
    update; the released code divides by that of each process.

    Attributes:
        weight: factor in the total.
        no_object_weight: weight of queries without a class; others have weight 1.
        easy_no_object: the loss of queries without a class is multiplied by 2 (1 - p)^2, where p is
            the probability of "no object" (TSP-RCNN).
        divisor_epsilon: added to the divisor (1e-6 in TSP-RCNN).

    Reference:
        Carion et al., ECCV 2020; Sun et al., ICCV 2021 (arXiv 2011.10881) for `easy_no_object`.
    """

    weight: float = 1.0
    no_object_weight: float = 0.1
    easy_no_object: bool = False
    divisor_epsilon: float = 0.0
    name: str = "class"
    divisor: Divisor = OWN

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Weighted sum over [B, Q] / sum of weights."""
        target_scores, empty = self._target_probabilities(prediction, targets, assignment.classes)
        logits = F.pad(prediction.logits, (0, 1))  # [B, Q, K + 1]
        log_p = logits.log_softmax(-1)
        loss = -(target_scores * log_p).sum(-1) * self._weights(empty, log_p)
        if self.easy_no_object:
            p = log_p[..., -1].detach().exp()
            loss = torch.where(empty, 2 * (1 - p) ** 2, 1.0) * loss
        return loss.sum() / (normalizers.of(self.divisor) + self.divisor_epsilon)

    def count(
        self, prediction: StagePrediction, targets: Targets, assignment: Assignment
    ) -> Tensor:
        """The sum of the queries' weights."""
        empty = self._target_probabilities(prediction, targets, assignment.classes)[1]
        return self._weights(empty, prediction.logits).sum()

    def _weights(self, empty: Tensor, like: Tensor) -> Tensor:
        return torch.where(empty, self.no_object_weight, 1.0).to(like.dtype)

    def _target_probabilities(
        self, prediction: StagePrediction, targets: Targets, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Target probabilities [B, Q, K + 1], and [B, Q], True for queries without a class."""
        weights = pairs.weights(prediction.logits)
        target_scores, positive = score_targets(prediction, targets, pairs, weights)
        empty = ~positive.any(-1)
        share = target_scores / target_scores.sum(-1, keepdim=True).clamp(
            min=torch.finfo(target_scores.dtype).tiny
        )
        return torch.cat([share, empty[..., None].to(share.dtype)], dim=-1), empty


@dataclass(frozen=True, slots=True)
class VarifocalClassLoss:
    """Target score is the IoU of box and target, which also weights the positive.

    Attributes:
        weight: factor in the total.
        alpha: weight of negatives.
        gamma: exponent of a negative's probability.
        detach: no gradient flows through that power (RT-DETR); in LW-DETR it does.
        epsilon: added to the denominator of the IoU.
        divisor: what the sum is divided by.

    Reference:
        Zhang et al., VarifocalNet, CVPR 2021; Zhao et al., RT-DETR, CVPR 2024 (arXiv 2304.08069),
        checked against lyuwenyu/RT-DETR.
    """

    weight: float = 1.0
    alpha: float = 0.75
    gamma: float = 2.0
    detach: bool = True
    epsilon: float = 0.0
    name: str = "class"
    divisor: Divisor = LARGER

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / divisor."""
        target_scores, weights = self.entries(prediction, targets, assignment.classes)
        return weighted_entropy(prediction.logits, target_scores, weights) / normalizers.of(
            self.divisor
        )

    def entries(
        self, prediction: StagePrediction, targets: Targets, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Target scores and weights, both [B, Q, K]."""
        overlap = paired_overlap(prediction, targets, pairs, self.epsilon)
        pair_scores = overlap * pairs.weights(overlap)
        target_scores, positive = score_targets(prediction, targets, pairs, pair_scores)
        logits = prediction.logits.detach() if self.detach else prediction.logits
        return target_scores, torch.where(
            positive, target_scores, self.alpha * logits.sigmoid() ** self.gamma
        )


@dataclass(frozen=True, slots=True)
class MatchabilityClassLoss:
    """Target score is a power of the IoU; a positive always has weight 1, so poor boxes learn too.

    Attributes:
        weight: factor in the total.
        gamma: exponent of the IoU, and of a negative's probability.
        epsilon: added to the denominator of the IoU.
        divisor: what the sum is divided by.

    Reference:
        Huang et al., DEIM, CVPR 2025 (arXiv 2412.04234), checked against ShihuaHuang95/DEIM.
    """

    weight: float = 1.0
    gamma: float = 1.5
    epsilon: float = 0.0
    name: str = "class"
    divisor: Divisor = LARGER

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / divisor."""
        target_scores, weights = self.entries(prediction, targets, assignment.classes)
        return weighted_entropy(prediction.logits, target_scores, weights) / normalizers.of(
            self.divisor
        )

    def entries(
        self, prediction: StagePrediction, targets: Targets, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Target scores and weights, both [B, Q, K]."""
        quality = paired_overlap(prediction, targets, pairs, self.epsilon) ** self.gamma
        pair_scores = quality * pairs.weights(quality)
        target_scores, positive = score_targets(prediction, targets, pairs, pair_scores)
        return target_scores, torch.where(
            positive, 1.0, prediction.logits.detach().sigmoid() ** self.gamma
        )


@dataclass(frozen=True, slots=True)
class IaBceClassLoss:
    """IoU-aware cross entropy with target score p^0.25 IoU^0.75; see `task_alignment`.

    Attributes:
        weight: factor in the total.
        gamma: exponent of a negative's probability.
        epsilon: added to the denominator of the IoU.
        divisor: what the sum is divided by.

    Reference:
        Cai et al., Align-DETR, BMVC 2024 (arXiv 2304.07527), checked against FelixCaae/AlignDETR.
    """

    weight: float = 1.0
    gamma: float = 2.0
    epsilon: float = 0.0
    name: str = "class"
    divisor: Divisor = LARGER

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / divisor."""
        pairs, logits = assignment.classes, prediction.logits
        quality = task_alignment(prediction, targets, pairs, self.epsilon)
        pair_scores = quality * pairs.weights(quality)
        target_scores, positive = score_targets(prediction, targets, pairs, pair_scores)
        weights = torch.where(positive, 1.0, logits.sigmoid() ** self.gamma)
        return weighted_entropy(logits, target_scores, weights) / normalizers.of(self.divisor)


@dataclass(frozen=True, slots=True)
class PositionSupervisedClassLoss:
    """Target score is a power of the IoU, scaled to 1 for the best pair of each image.

    Attributes:
        weight: factor in the total.
        power: exponent of the IoU: 2 in Stable-DINO, 1 in LW-DETR.
        alpha: weight of positives; negatives get 1 - alpha.
        gamma: exponent of the gap between score and target score.
        epsilon: added to the denominator of the IoU.
        divisor: what the sum is divided by.

    Reference:
        Liu et al., Stable-DINO, ICCV 2023 (arXiv 2304.04742), checked against
        IDEA-Research/Stable-DINO.
    """

    weight: float = 6.0
    power: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    epsilon: float = 0.0
    name: str = "class"
    divisor: Divisor = LARGER

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / divisor."""
        pairs, logits = assignment.classes, prediction.logits
        pair_scores = self.pair_scores(prediction, targets, pairs)
        scores = score_targets(prediction, targets, pairs, pair_scores)
        loss = score_gap_loss(logits, *scores, self.alpha, self.gamma)
        return loss.sum() / normalizers.of(self.divisor)

    def pair_scores(self, prediction: StagePrediction, targets: Targets, pairs: Pairs) -> Tensor:
        """The target score [M] of each pair."""
        quality = paired_overlap(prediction, targets, pairs, self.epsilon) ** self.power
        best = quality.new_zeros(targets.batch_size).scatter_reduce(0, pairs.image, quality, "amax")
        scale = (1 / (best + 1e-8)).clamp(min=1)  # [B]
        return quality * scale[pairs.image] * pairs.weights(quality)


@dataclass(frozen=True, slots=True)
class RankGiouClassLoss:
    """Target score is (GIoU + 1) / 2.

    Attributes:
        weight: factor in the total.
        alpha: weight of positives; negatives get 1 - alpha.
        gamma: exponent of the gap between score and target score.
        epsilon: added to the denominators of the GIoU.
        divisor: what the sum is divided by.

    Reference:
        Pu et al., Rank-DETR, NeurIPS 2023 (arXiv 2310.08854), checked against
        LeapLabTHU/Rank-DETR.
    """

    weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    epsilon: float = 0.0
    name: str = "class"
    divisor: Divisor = LARGER

    def __call__(
        self,
        prediction: StagePrediction,
        targets: Targets,
        assignment: Assignment,
        normalizers: Normalizers,
    ) -> Tensor:
        """Sum over [B, Q, K] / divisor."""
        pairs, logits = assignment.classes, prediction.logits
        overlap = paired_overlap(prediction, targets, pairs, self.epsilon, generalized=True)
        pair_scores = (overlap + 1) / 2 * pairs.weights(overlap)
        scores = score_targets(prediction, targets, pairs, pair_scores)
        loss = score_gap_loss(logits, *scores, self.alpha, self.gamma)
        return loss.sum() / normalizers.of(self.divisor)


CLASS_LOSSES: dict[str, type[LossTerm]] = {
    "focal": FocalClassLoss,
    "softmax": SoftmaxClassLoss,
    "varifocal": VarifocalClassLoss,
    "matchability": MatchabilityClassLoss,
    "ia_bce": IaBceClassLoss,
    "position_supervised": PositionSupervisedClassLoss,
    "rank_giou": RankGiouClassLoss,
}
