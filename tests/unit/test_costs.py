"""Matching costs by hand."""

from __future__ import annotations

import pytest
import torch

from detrelay.assigners.costs import FocalClassCost, GIoUBoxCost, L1BoxCost, default_costs
from detrelay.core.losses import LossConfig
from detrelay.core.structures import StagePrediction, Targets


def side_by_side() -> tuple[StagePrediction, Targets]:
    """A query's box of area 0.04 beside a target's of the same size, half a side apart."""
    prediction = StagePrediction(
        logits=torch.zeros(1, 1, 1, dtype=torch.float64),
        boxes=torch.tensor([[[0.2, 0.5, 0.2, 0.2]]], dtype=torch.float64),
    )
    boxes = torch.tensor([[0.3, 0.5, 0.2, 0.2]], dtype=torch.float64)
    return prediction, Targets(torch.tensor([0]), boxes, torch.tensor([0]), 1)


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_epsilon_is_in_both_denominators_of_the_giou(epsilon: float) -> None:
    shared, union, hull = 0.02, 0.06, 0.06
    expected = shared / (union + epsilon) - (hull - union) / (hull + epsilon)
    found = GIoUBoxCost(weight=2.0, epsilon=epsilon)(*side_by_side())
    assert found.item() == pytest.approx(-2 * expected, rel=1e-9)


def test_default_costs_take_their_numbers_from_the_loss() -> None:
    loss = LossConfig(alpha=0.3, gamma=1.5, log_epsilon=1e-5, giou_epsilon=1e-3, l1_format="xyxy")
    focal, l1, giou = default_costs(loss)
    assert (focal.alpha, focal.gamma, focal.epsilon) == (0.3, 1.5, 1e-5)
    assert l1 == L1BoxCost(weight=5.0, box_format="xyxy")
    assert giou == GIoUBoxCost(weight=2.0, epsilon=1e-3)


def test_costs_of_one_query_by_hand() -> None:
    prediction = StagePrediction(torch.zeros(1, 1, 2), torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]))
    targets = Targets(
        torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.5, 0.25]]), torch.tensor([0]), 1
    )
    log2 = torch.tensor(2.0).log().item()
    cost = FocalClassCost()(prediction, targets).item()
    assert cost == pytest.approx(2 * (0.25 - 0.75) * 0.25 * log2, rel=1e-5)
    assert L1BoxCost()(prediction, targets).item() == pytest.approx(5 * 0.25)
    assert L1BoxCost(box_format="xyxy")(prediction, targets).item() == pytest.approx(5 * 0.25)
    assert GIoUBoxCost()(prediction, targets).item() == pytest.approx(-2 * 0.5)
