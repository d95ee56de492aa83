"""Parts that the deformable detectors share."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from detrelay.heads import DeformableDetrConfig
from detrelay.heads.deformable.layers import (
    DecoderLayer,
    Mlp,
    ReadFirstDecoderLayer,
    box_code,
    inverse_sigmoid,
    move_boxes,
    reset_box_head,
    token_grid,
)
from factories import small_head_config


def small() -> DeformableDetrConfig:
    config = small_head_config("deformable_detr", num_levels=1, num_backbone_levels=1)
    assert isinstance(config, DeformableDetrConfig)
    return config


def test_logits_stop_short_of_0_and_1() -> None:
    found = inverse_sigmoid(torch.tensor([0.0, 0.5, 0.75, 2.0], dtype=torch.float64), 0.25)
    # 0 / 1 and 1 / 0 are kept at 0.25 / 1 and 1 / 0.25
    expected = torch.tensor([0.25, 1.0, 3.0, 4.0], dtype=torch.float64).log()
    torch.testing.assert_close(found, expected)


def test_boxes_move_by_steps_in_logits_and_points_get_a_size() -> None:
    steps = torch.tensor([[1.0, -1.0, 0.5, -2.0]])
    box, point = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0.5, 0.5]])
    torch.testing.assert_close(move_boxes(steps, box, 1e-5), steps.sigmoid())
    torch.testing.assert_close(move_boxes(steps, point, 1e-5), steps.sigmoid())
    moved = move_boxes(steps, torch.tensor([[0.2, 0.5]]), 1e-5)
    torch.testing.assert_close(moved[0, 0], (torch.tensor(0.25).log() + 1).sigmoid())


def test_code_of_a_box_goes_number_by_number() -> None:
    code = box_code(torch.tensor([[0.0, 0.25, 0.0, 0.5]]), 8)
    assert code.shape == (1, 16)
    quarter, half = code[0, 4:8], code[0, 12:]
    torch.testing.assert_close(code[0, :4], torch.tensor([0.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(quarter[:2], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(half[:2], torch.tensor([0.0, -1.0]), atol=1e-6, rtol=0)


def test_relu_is_only_between_the_layers() -> None:
    mlp = Mlp(1, 1, 1)
    for layer in mlp.layers:
        torch.nn.init.ones_(layer.weight)  # type: ignore[arg-type]
        torch.nn.init.constant_(layer.bias, -1.0)  # type: ignore[arg-type]
    found = mlp(torch.tensor([[3.0], [0.0]]))
    assert found.tolist() == [[1.0], [-1.0]]
    reset_box_head(mlp)
    assert mlp(torch.tensor([[3.0]])).tolist() == [[0.0]]


def test_the_grid_is_in_units_of_the_unpadded_image() -> None:
    valid = torch.zeros(1, 2, 4, dtype=torch.bool)
    valid[:, :1, :2] = True
    grid = token_grid([valid, torch.ones(1, 1, 1, dtype=torch.bool)], torch.float32)
    assert grid.shapes == ((2, 4), (1, 1))
    assert grid.valid.tolist() == [[True, True, *[False] * 6, True]]
    x, y = grid.centers[0].T
    assert x.tolist() == [0.25, 0.75, 1.25, 1.75, 0.25, 0.75, 1.25, 1.75, 0.5]
    assert y.tolist() == [0.5] * 4 + [1.5] * 4 + [0.5]
    assert grid.ratios.tolist() == [[[0.5, 0.5], [1.0, 1.0]]]
    seen = grid.in_levels(torch.tensor([[[0.5, 1.0, 0.2, 0.4]]]))
    torch.testing.assert_close(seen[0, 0, 0], torch.tensor([0.25, 0.5, 0.1, 0.2]))
    torch.testing.assert_close(seen[0, 0, 1], torch.tensor([0.5, 1.0, 0.2, 0.4]))


def test_masked_queries_do_not_hear_each_other() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(small()).eval()
    queries = torch.randn(1, 3, 32)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 2] = True
    position = torch.zeros_like(queries)
    before = layer.attend(queries, position, mask)
    queries[:, 2] += 1
    after = layer.attend(queries, position, mask)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_a_branch_is_read_in_training_only() -> None:
    torch.manual_seed(0)
    layer = ReadFirstDecoderLayer(small())
    queries = torch.randn(1, 3, 32)
    grid = token_grid([torch.ones(1, 2, 2, dtype=torch.bool)], torch.float32)
    arguments = (queries, 0 * queries, torch.rand(1, 3, 2), (torch.randn(1, 4, 32), grid))
    refined, branch = layer.train()(*arguments)
    again, none = layer.eval()(*arguments)
    assert branch is not None
    assert none is None
    torch.testing.assert_close(again, refined)
    assert not torch.allclose(branch, refined)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        StrictDataclassError, match=r"num_backbone_levels must lie in 1..4 and not exceed"
    ):
        small_head_config("deformable_detr", num_levels=1, num_backbone_levels=2)
