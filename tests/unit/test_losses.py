"""Box losses by hand, and the config that terms are built from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from detrelay.core.criterion import Criterion
from detrelay.core.losses import FocalClassLoss, GIoUBoxLoss, L1BoxLoss, LossConfig
from detrelay.core.structures import (
    StageGroup,
)
from factories import Fixed, fixed, one_query


def test_l1_formats_differ_as_they_should() -> None:
    prediction, targets = one_query()
    targets = replace(targets, boxes=torch.tensor([[0.4, 0.5, 0.5, 0.5]]))
    pair = fixed((0, 0, 0))
    for box_format, expected in (("cxcywh", 0.1), ("xyxy", 0.2)):
        term = L1BoxLoss(box_format=box_format)  # type: ignore[arg-type]
        output = Criterion([term], {"decoder": Fixed(pair, pair)})(
            [StageGroup("decoder", (prediction,))], targets
        )
        assert output.losses["decoder/0/l1"].item() == pytest.approx(expected)


def test_terms_carry_their_weights() -> None:
    terms = LossConfig(class_weight=3, l1_weight=4, giou_weight=5, alpha=0.5, gamma=1).terms()
    assert terms == (FocalClassLoss(3, 0.5, 1), L1BoxLoss(4), GIoUBoxLoss(5))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("class_weight", -1.0, "loss.class_weight must be at least 0, found -1"),
        ("giou_weight", math.nan, "found nan"),
        ("l1_weight", math.inf, "found inf"),
        ("gamma", -2.0, "loss.gamma must be"),
        ("alpha", 1.5, "loss.alpha must be a share, 0 to 1, found 1.5"),
    ],
)
def test_nonsensical_numbers_are_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LossConfig(), **{name: value})


def test_a_negative_weight_of_an_own_loss_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"loss\.extra_losses: the weight of a:B must be at least 0"
    ):
        LossConfig(extra_losses=("a:B:-1",)).terms()
