"""The box representation of StageInteractor's decoder."""

from __future__ import annotations

import math

import torch

from detrelay.heads.stageinteractor.geometry import (
    grid_boxes,
    log_coverage,
    position_code,
    sizes_of,
)


def test_sizes_follow_from_scale_and_ratio() -> None:
    # 32 pixels of scale, twice as high as wide
    size = sizes_of(torch.tensor([7.0, 9.0, 5.0, 1.0], dtype=torch.float64))
    expected = torch.tensor([2**4.5, 2**5.5], dtype=torch.float64)
    torch.testing.assert_close(size, expected)


def test_code_of_a_position_by_hand() -> None:
    box = torch.tensor([500.0, 250.0, 1.0, -1.0], dtype=torch.float64)
    code = position_code(box, 16)
    turns = [0.5, 0.25, 1.0, -1.0]
    # width 4 for each number: exponents 0 and 1/2 of 10000
    expected = [f(t / unit) for t in turns for unit in (1.0, 100.0) for f in (math.sin, math.cos)]
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64))


def test_coverage_is_the_covered_share_of_the_own_box() -> None:
    # 100 x 100 at (50, 50), and 50 x 100 (scale sqrt(5000), ratio 2) in its left half
    boxes = torch.tensor(
        [[50, 50, math.log2(100), 0], [25, 50, math.log2(5000) / 2, 1], [500, 50, 1, 0]],
        dtype=torch.float64,
    )
    expected = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    torch.testing.assert_close(log_coverage(boxes[None])[0], (expected + 1e-7).log())


def test_a_grid_of_five_boxes_by_hand() -> None:
    width, height = 2 / 3, 1.0
    torch.testing.assert_close(
        grid_boxes(5, torch.zeros((), dtype=torch.float64)),
        torch.tensor(
            [
                [1 / 6, 0.25, width, height],
                [0.5, 0.25, width, height],
                [5 / 6, 0.25, width, height],
                [0.25, 0.75, width, height],
                [0.75, 0.75, width, height],
            ],
            dtype=torch.float64,
        ),
    )
