"""Assigners by name."""

from __future__ import annotations

import pytest

from detrelay.assigners import CrossStageAssigner, HungarianAssigner, build_assigners
from detrelay.assigners.costs import FocalClassCost, L1BoxCost
from detrelay.core.losses import LossConfig


def test_build_assigners_by_name_and_option() -> None:
    loss = LossConfig(l1_format="xyxy", alpha=0.4)
    table = build_assigners("cross_stage", loss, {"iou_threshold": 0.7})
    decoder = table["decoder"]
    assert isinstance(decoder, CrossStageAssigner)
    assert decoder.thresholds == (0.7,)
    assert isinstance(table["proposals"], HungarianAssigner)
    costs = decoder.base.costs  # type: ignore[attr-defined]
    assert L1BoxCost(box_format="xyxy") in costs
    assert FocalClassCost(alpha=0.4) in costs
    with pytest.raises(ValueError, match="unknown assigner 'cross_stag'; did you mean"):
        build_assigners("cross_stag", loss)
    with pytest.raises(ValueError, match="no option 'iou_treshold'; did you mean 'iou_threshold'"):
        build_assigners("cross_stage", loss, {"iou_treshold": 0.7})
    with pytest.raises(ValueError, match="no option 'costs'"):
        build_assigners("hungarian", loss, {"costs": []})
