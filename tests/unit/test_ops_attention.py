"""Attention by either implementation."""

from __future__ import annotations

import math

import pytest
import torch

from detrelay.core.ops.attention import attend


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_by_hand(implementation: str) -> None:
    query = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]])
    key = torch.tensor([[[[math.log(3.0), 0, 0, 0], [0.0, 0, 0, 0], [9.0, 0, 0, 0]]]])
    value = torch.tensor([[[[4.0], [8.0], [100.0]]]])
    bias = torch.tensor([[0.0, 0.0, -torch.inf]])  # the last one is hidden
    # logits ln 3 and 0 after the division by sqrt(4): weights 3/4 and 1/4
    found = attend(query, key, value, bias, implementation)
    torch.testing.assert_close(found, torch.tensor([[[[5.0]]]]))
    without = attend(query, key[:, :, :2], value[:, :, :2], None, implementation)
    torch.testing.assert_close(without, found)
