"""The one-to-many rule by score and overlap combined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detrelay.assigners.one_to_many import OneToManyAssigner
from detrelay.core.structures import StagePrediction, Targets

BOX = torch.tensor([[0.5, 0.5, 0.4, 0.4]])


def test_the_score_mixes_overlap_and_probability() -> None:
    half = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    stage = StagePrediction(torch.zeros(1, 2, 1), torch.cat([BOX, half])[None])
    targets = Targets(torch.tensor([0]), BOX, torch.tensor([0]), 1)
    (score,) = OneToManyAssigner(iou_weight=0.7).tables(stage, targets)
    torch.testing.assert_close(score, torch.tensor([[0.7 + 0.15, 0.35 + 0.15]]))


def test_references_are_used_if_requested() -> None:
    far = torch.tensor([[[0.1, 0.1, 0.1, 0.1]]])
    stage = StagePrediction(torch.zeros(1, 1, 1), far, BOX[None])
    targets = Targets(torch.tensor([0]), BOX, torch.tensor([0]), 1)
    (score,) = OneToManyAssigner(boxes="references").tables(stage, targets)
    torch.testing.assert_close(score, torch.tensor([[0.85]]))


def test_the_best_of_a_target_is_positive_below_the_threshold_too() -> None:
    score = np.array([[0.9, 0.4, 0.1, 0.39], [0.1, 0.2, 0.3, 0.0]])
    assert OneToManyAssigner().positives(score).tolist() == [True, True, True, False]


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"iou_weight must lie in \[0, 1\], found 1.1"):
        OneToManyAssigner(iou_weight=1.1)
