"""Position encodings by hand, with and without padding."""

from __future__ import annotations

import math

import torch

from detrelay.core.ops.position_encoding import grid_position_code, sine_code


def test_sine_code_by_hand() -> None:
    code = sine_code(torch.tensor([0.25, 0.5], dtype=torch.float64), 4, 100.0)
    quarter, half = math.pi / 2, math.pi
    expected = [1, 0, math.sin(quarter / 10), math.cos(quarter / 10),
                0, -1, math.sin(half / 10), math.cos(half / 10)]  # fmt: skip
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def test_position_code_does_not_depend_on_padding() -> None:
    real = torch.ones(1, 3, 4, dtype=torch.bool)
    padded = torch.zeros(1, 5, 7, dtype=torch.bool)
    padded[:, :3, :4] = True
    alone = grid_position_code(real, 8, 20.0, 0.0, torch.float32)
    among = grid_position_code(padded, 8, 20.0, 0.0, torch.float32).unflatten(1, (5, 7))
    torch.testing.assert_close(among[:, :3, :4].flatten(1, 2), alone)
    assert among.isfinite().all()
