"""Initial boxes from the encoder's tokens."""

from __future__ import annotations

import torch

from detrelay.heads.deformable.layers import token_grid
from detrelay.heads.deformable.proposals import ProposalFeatures, best_tokens, take_tokens


def test_every_real_token_has_an_anchor_as_large_as_its_level() -> None:
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    valid[:, :, 2] = False
    grid = token_grid([valid, torch.ones(1, 1, 1, dtype=torch.bool)], torch.float64)
    torch.manual_seed(0)
    make = ProposalFeatures(8).double()
    features, anchors, proposes = make(torch.randn(1, 7, 8, dtype=torch.float64), grid)
    assert proposes.tolist() == [[True, True, False, True, True, False, True]]
    fine = [[x, y, 0.05, 0.05] for y in (0.25, 0.75) for x in (0.25, 0.75)]
    expected = torch.tensor([*fine, [0.5, 0.5, 0.1, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(anchors[proposes].sigmoid(), expected)
    assert (anchors[~proposes] == torch.inf).all()
    nothing = make.norm(make.project(torch.zeros(8, dtype=torch.float64)))
    torch.testing.assert_close(features[~proposes], nothing.expand(2, 8))
    assert not torch.allclose(features[0, 0], nothing)


def test_an_anchor_larger_than_the_image_proposes_nothing() -> None:
    levels = [torch.ones(1, 1, 1, dtype=torch.bool)] * 6  # sides 0.05, 0.1, ... 0.8, 1.6
    grid = token_grid(levels, torch.float32)
    _, _, proposes = ProposalFeatures(8)(torch.zeros(1, 6, 8), grid)
    assert proposes.tolist() == [[True, True, True, True, True, False]]


def test_the_best_come_first_and_those_without_an_anchor_last() -> None:
    scores, proposes = torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[False, True, True]])
    assert best_tokens(scores, proposes, 2).tolist() == [[2, 1]]
    assert best_tokens(scores, proposes, 9).tolist() == [[2, 1, 0]]


def test_rows_are_taken_image_by_image() -> None:
    values = torch.arange(8).view(2, 2, 2)
    index = torch.tensor([[1], [0]])
    assert take_tokens(values, index).tolist() == [[[2, 3]], [[4, 5]]]
