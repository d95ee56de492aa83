"""The loss that a head was published with."""

from __future__ import annotations

import pytest

from detrelay.assigners import CrossStageAssigner, HungarianAssigner
from detrelay.core.detector.loss import published_criterion
from detrelay.core.losses import LossConfig


def test_numbers_and_assigner_are_the_named_ones() -> None:
    criterion = published_criterion(LossConfig(class_weight=3.0), "cross_stage")
    assert [(term.name, term.weight) for term in criterion.terms] == [
        ("class", 3.0),
        ("l1", 5.0),
        ("giou", 2.0),
    ]
    assert isinstance(criterion.assigners["decoder"], CrossStageAssigner)
    assert isinstance(criterion.assigners["proposals"], HungarianAssigner)
    with pytest.raises(ValueError, match="unknown assigner 'crossstage'; did you mean"):
        published_criterion(LossConfig(), "crossstage")
