"""Sampling points by hand."""

from __future__ import annotations

import math

import pytest
import torch

from detrelay.heads.stageinteractor.sampling import PointGenerator, uniform_offsets

# 40 x 10 pixels around (100, 50): scale log2 of 20, ratio log2 of 1/4
BOX = torch.tensor([[[100.0, 50.0, math.log2(20), -2.0]]])


def test_a_pattern_surrounds_its_base_point_and_scales_with_it() -> None:
    make = PointGenerator(dim=8, groups=1, base_points=1, pattern=2, two_step=True)
    assert make.inner is not None
    make.base.bias.data = torch.tensor([0.1, -0.2, 1.0])
    make.inner.bias.data = torch.tensor([0.0, 0.0, 0.0, 0.25, 0.5, -1.0])
    positions, scales = make(torch.randn(1, 1, 8), BOX)
    x, y = positions.squeeze()
    torch.testing.assert_close(x, torch.tensor([104.0, 124.0]))
    torch.testing.assert_close(y, torch.tensor([48.0, 58.0]))
    torch.testing.assert_close(scales.squeeze(), math.log2(20) + torch.tensor([1.0, 0.0]))


def test_one_step_predicts_all_points() -> None:
    make = PointGenerator(dim=8, groups=2, base_points=1, pattern=2, two_step=False, start_scale=3)
    positions, scales = make(torch.randn(1, 1, 8), BOX)
    assert positions.shape == (2, 1, 1, 2, 2)
    torch.testing.assert_close(scales, torch.full((1, 1, 2, 2), math.log2(20) + 3))
    offsets = make.base.bias.view(2, 2, 3)
    torch.testing.assert_close(positions[0, 0, 0], 100 + 40 * offsets[..., 0])
    torch.testing.assert_close(positions[1, 0, 0], 50 + 10 * offsets[..., 1])


def test_offsets_spread_over_the_box_and_keep_their_scale() -> None:
    torch.manual_seed(0)
    offsets = uniform_offsets(1000, bound=0.5)
    assert not offsets[:, 2].any()
    assert offsets[:, :2].abs().max() == pytest.approx(0.5, abs=0.01)
    assert offsets[:, :2].abs().max() <= 0.5
