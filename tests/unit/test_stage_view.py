"""What a decoder stage detects, and which labels it learns."""

from __future__ import annotations

import torch
from torch import tensor

from detrelay.apps.drawing import draw_boxes
from detrelay.apps.stage_view import (
    LearnedLabel,
    Objects,
    StageView,
    draw_labels,
    label_rows,
    learned_labels,
)
from detrelay.core.structures import Assignment, Pairs, StagePrediction


def pairs(*rows: tuple[int, int]) -> Assignment:
    """Class and box pairs of (query, object) in the one image of a batch."""
    query, target = tensor(rows, dtype=torch.long).reshape(-1, 2).unbind(1)
    found = Pairs(torch.zeros_like(query), query, target)
    return Assignment(found, found)


def planted_view() -> StageView:
    """Two stages of two queries that swap two objects; the second stage learns both ways."""
    boxes = tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]])
    stage = StagePrediction(torch.zeros(1, 2, 2), boxes)
    corners = tensor([[0.0, 0, 50, 80], [50.0, 0, 100, 40]])
    return StageView(
        pixels=torch.zeros(3, 80, 100, dtype=torch.uint8),
        stages=(stage, stage),
        objects=Objects(corners, tensor([1, 0])),
        own=(pairs((0, 0), (1, 1)), pairs((1, 0))),
        learned=(pairs((0, 0), (1, 1)), pairs((0, 0), (1, 0), (0, 1))),
    )


def test_labels_are_own_or_say_from_which_stage_they_came() -> None:
    view = planted_view()
    assert learned_labels(view, 0) == [LearnedLabel(0, 0, 0, 1.0), LearnedLabel(1, 1, 0, 0.5)]
    labels = learned_labels(view, 1)
    assert labels == [
        LearnedLabel(query=1, target=0, origin=1, iou=0.0),
        LearnedLabel(query=0, target=0, origin=0, iou=1.0),
        LearnedLabel(query=0, target=1, origin=None, iou=0.0),
    ]
    assert label_rows(view, 1, labels, ["cat", "dog"]) == [
        [1, 1, "dog", "own", 0.0],
        [0, 1, "dog", "stage 1", 1.0],
        [0, 2, "cat", "no stage", 0.0],
    ]


def test_labels_that_travelled_are_dashed_and_say_from_where() -> None:
    image, box = torch.zeros(3, 400, 400, dtype=torch.uint8), tensor([[50.0, 50, 300, 300]])
    solid, dashed = (draw_boxes(image, box, [0], [""], dashed=[dash]) for dash in (False, True))
    drawn = [int((picture != image).any(0).sum()) for picture in (solid, dashed)]
    assert 0.4 < drawn[1] / drawn[0] < 0.6
    view = planted_view()
    own, travelled = (
        draw_labels(view, 1, [LearnedLabel(0, 0, origin, 1.0)], ["cat", "dog"]) for origin in (1, 0)
    )
    assert not torch.equal(own, travelled)
    objects_only = draw_labels(view, 1, [], ["cat", "dog"])
    assert (objects_only == 255).all(0).any()
