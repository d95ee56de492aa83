from __future__ import annotations

import pytest
import torch

from detrelay.core.structures import (
    FeaturePyramid,
    Pairs,
    StagePrediction,
    Targets,
)
from factories import fixed


def test_targets_from_labels_flatten_the_batch() -> None:
    targets = Targets.from_labels(
        [
            {"class_labels": torch.tensor([3, 1]), "boxes": torch.rand(2, 4)},
            {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
            {"class_labels": torch.tensor([2]), "boxes": torch.rand(1, 4)},
        ]
    )
    assert targets.labels.tolist() == [3, 1, 2]
    assert targets.image.tolist() == [0, 0, 2]
    assert targets.boxes.shape == (3, 4)
    assert targets.batch_size == 3


def test_targets_may_be_empty() -> None:
    targets = Targets.from_labels([{"class_labels": torch.zeros(0), "boxes": torch.zeros(0, 4)}])
    assert len(targets) == 0
    assert targets.labels.dtype == torch.int64


def test_targets_refuse_labels_without_boxes() -> None:
    with pytest.raises(ValueError, match="image 0 of the batch has 2 class_labels but 1 boxes"):
        Targets.from_labels([{"class_labels": torch.tensor([0, 1]), "boxes": torch.rand(1, 4)}])
    with pytest.raises(ValueError, match="at least one image"):
        Targets.from_labels([])
    with pytest.raises(ValueError, match="must agree on T"):
        Targets(torch.zeros(2), torch.zeros(1, 4), torch.zeros(2), 1)


def test_class_agnostic_leaves_the_original_alone() -> None:
    targets = Targets(torch.tensor([5]), torch.rand(1, 4), torch.tensor([0]), 1)
    assert targets.class_agnostic().labels.tolist() == [0]
    assert targets.labels.tolist() == [5]


def test_prediction_float_promotes_half_and_keeps_double() -> None:
    half = StagePrediction(torch.zeros(1, 1, 1).half(), torch.zeros(1, 1, 4).bfloat16())
    assert half.float().logits.dtype == half.float().boxes.dtype == torch.float32
    double = StagePrediction(torch.zeros(1, 1, 1).double(), torch.zeros(1, 1, 4).double())
    assert double.float().boxes.dtype == torch.float64


def test_pairs_select_and_cat() -> None:
    pairs = Pairs(torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([2, 3]))
    joined = Pairs.cat([pairs.select(torch.tensor([False, True])), pairs])
    assert joined.query.tolist() == [5, 4, 5]
    assert joined.target.tolist() == [3, 2, 3]
    assert joined.image.tolist() == [1, 0, 1]


def test_pyramid_needs_one_entry_a_level() -> None:
    level = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="one entry per level"):
        FeaturePyramid((level,), (4, 8), (torch.ones(1, 3, 3),), torch.tensor([[3, 3]]))


def test_weights_stay_with_their_pairs() -> None:
    pairs = fixed((0, 0, 0), (0, 1, 1), weight=[0.25, 0.5])
    assert pairs.select(torch.tensor([1])).weight == torch.tensor([0.5])
    together = Pairs.cat([fixed((1, 0, 2)), pairs])
    assert together.weight is not None
    assert together.weight.tolist() == [1, 0.25, 0.5]
    assert Pairs.cat([fixed((1, 0, 2)), fixed((1, 1, 2))]).weight is None
