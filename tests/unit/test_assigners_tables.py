"""The base of assigners that decide from tables, image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detrelay.assigners.tables import (
    TableAssigner,
    check_box_source,
    overlap_table,
    rows_of,
    score_table,
    with_boxes,
)
from detrelay.core.structures import StagePrediction, Targets

BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.2, 0.4]])
STAGE = StagePrediction(torch.zeros(2, 2, 2), BOXES.expand(2, 2, 4))
# of the second image first: a target's row in the batch is not its row in the image
TARGETS = Targets(torch.tensor([1, 0, 1]), BOXES[[0, 1, 1]], torch.tensor([1, 0, 1]), 2)


class Diagonal(TableAssigner):
    """Query q answers target q of its image; classes and boxes alike unless `apart`."""

    def __init__(self, apart: bool = False, cost: float = 0.0) -> None:
        self.apart, self.cost = apart, cost

    def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
        table = torch.zeros(1, len(targets), 2)
        table[0, 1] = self.cost
        return table

    def choose(self, tables: Any, stage: int, image: int) -> tuple[Any, Any]:
        count = np.arange(tables.shape[1])
        pairs = rows_of(count, count)
        return (pairs[:1], pairs) if self.apart else (pairs, pairs)


def test_choices_within_an_image_become_rows_of_the_batch() -> None:
    for assignment in Diagonal()([STAGE, STAGE], TARGETS):
        assert assignment.classes is assignment.boxes
        pairs = assignment.boxes
        assert pairs.image.tolist() == [0, 1, 1]
        assert pairs.query.tolist() == [0, 0, 1]
        assert pairs.target.tolist() == [1, 0, 2]
    (apart,) = Diagonal(apart=True)([STAGE], TARGETS)
    assert apart.classes.target.tolist() == [1, 0]
    assert apart.boxes.target.tolist() == [1, 0, 2]


def test_no_target_makes_no_pair() -> None:
    nothing = Targets(TARGETS.labels[:0], BOXES[:0], TARGETS.image[:0], 2)

    class Empty(Diagonal):
        def tables(self, stage: StagePrediction, targets: Targets) -> Tensor:
            return torch.zeros(1, 0, 2)

    (assignment,) = Empty()([STAGE], nothing)
    assert len(assignment.boxes) == 0


def test_a_nan_cost_is_named() -> None:
    with pytest.raises(FloatingPointError, match=r"cost in stage 0; images of the batch: \[0\]"):
        Diagonal(cost=float("nan"))([STAGE], TARGETS)


def test_tables_of_overlap_and_score() -> None:
    expected = torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.5, 1.0]])
    torch.testing.assert_close(overlap_table(STAGE, TARGETS), expected)
    logits = torch.zeros(2, 2, 2)
    logits[1, 0, 1] = 3.0
    stage = StagePrediction(logits, STAGE.boxes)
    score = torch.full((3, 2), 0.5)
    score[[0, 2], 0] = torch.tensor(3.0).sigmoid()
    torch.testing.assert_close(score_table(stage, TARGETS), score)


def test_box_source_must_be_known_and_provided() -> None:
    assert with_boxes(STAGE, "predicted") is STAGE
    started = StagePrediction(STAGE.logits, STAGE.boxes, STAGE.boxes / 2)
    assert torch.equal(with_boxes(started, "references").boxes, STAGE.boxes / 2)
    with pytest.raises(ValueError, match='the head provides none; use boxes = "predicted"'):
        with_boxes(STAGE, "references")
    with pytest.raises(ValueError, match="must be 'predicted' or 'references', found 'anchors'"):
        check_box_source("anchors")
