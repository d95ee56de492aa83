"""Class losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from detrelay.core.class_losses import (
    FocalClassLoss,
    IaBceClassLoss,
    MatchabilityClassLoss,
    PositionSupervisedClassLoss,
    RankGiouClassLoss,
    SoftmaxClassLoss,
    VarifocalClassLoss,
)
from detrelay.core.loss_terms import LossTerm, Normalizers
from detrelay.core.structures import Assignment, StagePrediction, Targets
from factories import fixed, one_query


def test_focal_loss_equals_torchvision() -> None:
    from torchvision.ops import sigmoid_focal_loss as reference

    from detrelay.core.losses import sigmoid_focal_loss

    logits = torch.linspace(-6, 6, 40, dtype=torch.float64)
    wanted = (torch.arange(40) % 3 == 0).double()
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, wanted, alpha=0.3, gamma=1.5),
        reference(logits, wanted, alpha=0.3, gamma=1.5),
    )


LOG2 = math.log(2)
P = 1 / (1 + math.exp(-1))  # of the positive entry, whose logit is 1; that of the negative is 0


def entropy(aim: float) -> float:
    """Binary cross entropy of the positive entry."""
    return math.log1p(math.e) - aim


@pytest.mark.parametrize(
    ("term", "expected"),
    [  # the box overlaps its target by a half, and lies around it
        (FocalClassLoss(), 0.25 * (1 - P) ** 2 * entropy(1) + 0.75 * 0.25 * LOG2),
        (VarifocalClassLoss(), 0.5 * entropy(0.5) + 0.75 * 0.25 * LOG2),
        (MatchabilityClassLoss(), entropy(0.5**1.5) + 0.5**1.5 * LOG2),
        (IaBceClassLoss(), entropy(P**0.25 * 0.5**0.75) + 0.25 * LOG2),
        # the best of an image aims at 1
        (
            PositionSupervisedClassLoss(),
            0.25 * (1 - P) ** 2 * entropy(1) + 0.75 * 0.25 * LOG2,
        ),
        (RankGiouClassLoss(), 0.25 * (0.75 - P) ** 2 * entropy(0.75) + 0.75 * 0.25 * LOG2),
        (SoftmaxClassLoss(), math.log(2 + math.e) - 1),
    ],
)
def test_one_query_by_hand(term: LossTerm, expected: float) -> None:
    prediction = StagePrediction(
        torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.5, 0.5, 0.5, 0.5]]])
    )
    targets = Targets(
        torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.5, 0.25]]), torch.tensor([0]), 1
    )
    one = torch.tensor(1.0)
    pair = fixed((0, 0, 0))
    loss = term(prediction, targets, Assignment(pair, pair), Normalizers(one, one, one, one))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_queries_without_an_object_count_little_in_the_softmax() -> None:
    prediction, targets = one_query()  # logits 0 of three classes; the second query has no object
    pair = fixed((0, 0, 0))
    term = SoftmaxClassLoss()
    own = term.count(prediction, targets, Assignment(pair, pair))
    assert own.item() == pytest.approx(1.1)
    one = torch.tensor(1.0)
    loss = term(prediction, targets, Assignment(pair, pair), Normalizers(one, one, one, own))
    assert loss.item() == pytest.approx(math.log(4))
    easy = SoftmaxClassLoss(easy_no_object=True)
    loss = easy(prediction, targets, Assignment(pair, pair), Normalizers(one, one, one, own))
    assert loss.item() == pytest.approx(math.log(4) * (1 + 0.1 * 2 * 0.75**2) / 1.1)
