"""Deformable DETR's head: where queries and boxes start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from detrelay.heads.deformable.detr import DeformableDetrConfig, DeformableDetrHead
from factories import make_pyramid, small_head_config


def fresh(case: str) -> DeformableDetrHead:
    torch.manual_seed(0)
    config = small_head_config(case)
    assert isinstance(config, DeformableDetrConfig)
    return DeformableDetrHead(config).eval()


@pytest.mark.parametrize("case", ["deformable_detr", "deformable_detr_refine"])
def test_boxes_start_at_the_reference_points_with_the_published_size(case: str) -> None:
    head = fresh(case)
    (group,) = head(make_pyramid())
    position = head.queries.weight[:, :32]
    points = (head.reference(position)).sigmoid()
    size = torch.full((8, 2), -2.0).sigmoid()
    for stage in group.stages:
        for boxes in stage.boxes:
            torch.testing.assert_close(boxes, torch.cat([points, size], dim=1))


def test_stages_have_box_heads_of_their_own_with_refinement_only() -> None:
    assert len(fresh("deformable_detr").refine) == 1
    head = fresh("deformable_detr_refine")
    assert len(head.refine) == len(head.classify) == 3
    (group,) = head(make_pyramid())
    # every stage starts from the boxes of the one before, the first from points
    assert group.stages[0].references is None
    assert torch.equal(group.stages[1].references, group.stages[0].boxes)
    (group,) = fresh("deformable_detr")(make_pyramid())
    assert group.stages[2].references is None


def test_queries_of_two_stages_start_from_the_best_proposals() -> None:
    head = fresh("deformable_detr_two_stage")
    pyramid = make_pyramid()
    padded = torch.ones_like(pyramid.valid[0])
    padded[:, 8:] = False
    head.classify_proposals.weight.data.normal_()
    group, proposals = head(replace(pyramid, valid=(padded, *pyramid.valid[1:])))
    assert (proposals.name, proposals.class_agnostic) == ("proposals", True)
    (stage,) = proposals.stages
    assert stage.references is not None
    anchored = stage.references[..., 2] > 0
    assert not anchored[:, :384][~padded.flatten(1)].any()
    scores = stage.logits[..., 0].masked_fill(~anchored, -torch.inf)
    best = scores.topk(8, dim=1).indices
    expected = torch.stack([boxes[index] for boxes, index in zip(stage.boxes, best, strict=True)])
    torch.testing.assert_close(group.stages[0].references, expected)


def test_two_stages_without_refinement_are_refused() -> None:
    with pytest.raises(StrictDataclassError, match="two_stage needs box_refinement"):
        small_head_config("deformable_detr", two_stage=True)
