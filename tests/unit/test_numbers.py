"""Host numbers as tensors."""

from __future__ import annotations

import torch

from detrelay.core.ops.numbers import filled


def test_rows_take_dtype_and_device_of_another_tensor() -> None:
    found = filled([(1, 2.5), (3, 4)], torch.zeros(1, dtype=torch.float64))
    assert found.dtype == torch.float64
    assert found.tolist() == [[1.0, 2.5], [3.0, 4.0]]
