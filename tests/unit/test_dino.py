"""DINO's head: look forward twice, and the code of its boxes."""

from __future__ import annotations

import torch

from detrelay.heads.deformable.dino import DinoConfig, DinoHead
from detrelay.heads.deformable.layers import box_code, token_grid
from detrelay.heads.deformable.passes import DecoderState
from factories import make_pyramid, small_head_config


def fresh() -> DinoHead:
    torch.manual_seed(0)
    config = small_head_config("dino")
    assert isinstance(config, DinoConfig)
    head = DinoHead(config)
    for parameter in (*head.refine.parameters(), *head.norm.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    return head


def test_boxes_carry_the_gradient_of_one_stage_before() -> None:
    head = fresh()
    queries = torch.randn(1, 8, 32)
    references = torch.full((1, 8, 4), 0.5)
    before = references.clone().requires_grad_()
    state = DecoderState(queries, references, supervised=before)
    prediction, following = head.predict(0, queries, state)
    # in logits a half is 0: boxes are the sigmoid of the step, which the norm goes before
    torch.testing.assert_close(prediction.boxes, head.refine(head.norm(queries)).sigmoid())
    (gradient,) = torch.autograd.grad(prediction.boxes.sum(), before, retain_graph=True)
    assert gradient.abs().min() > 0
    # the next stage starts from queries before the norm, without gradient
    torch.testing.assert_close(following.references, head.refine(queries).sigmoid())
    assert not following.references.requires_grad
    assert following.supervised is not None
    assert following.supervised.requires_grad


def test_boxes_are_coded_with_y_before_x_in_units_of_the_padded_level() -> None:
    head = fresh()
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, :, 2:] = False
    grid = token_grid([valid], torch.float32)
    boxes = torch.tensor([[[0.2, 0.6, 0.4, 0.8]]])
    state = DecoderState(torch.zeros(1, 1, 32), boxes)
    code = head.place(state, (torch.zeros(1, 16, 32), grid))
    seen = torch.tensor([[[0.6, 0.1, 0.2, 0.8]]])  # the image covers half of the width
    torch.testing.assert_close(code, head.reference_code(box_code(seen, 32)))


def test_query_k_starts_from_the_kth_best_proposal_with_content_k() -> None:
    head = fresh().eval()
    own, proposals = head(make_pyramid())
    assert proposals.slots == "decoder"
    (stage,) = proposals.stages
    best = stage.logits.amax(-1)
    assert torch.equal(best, best.sort(dim=1, descending=True).values)
    torch.testing.assert_close(own.stages[0].references, stage.boxes)
