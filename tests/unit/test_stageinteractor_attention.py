"""Overlap-biased self-attention against the explicit formula."""

from __future__ import annotations

import torch

from detrelay.heads.stageinteractor.attention import OverlapBiasedAttention
from detrelay.heads.stageinteractor.geometry import log_coverage
from factories import small_config


def test_each_head_weighs_coverage_by_its_own_scale() -> None:
    torch.manual_seed(0)
    module = OverlapBiasedAttention(small_config()).double()
    torch.nn.init.normal_(module.in_proj_bias)
    queries = torch.randn(1, 5, 32, dtype=torch.float64)
    boxes = torch.cat([50 * torch.rand(1, 5, 2), torch.full((1, 5, 2), 5.0)], dim=-1).double()
    boxes[..., 3] = 0
    query, key, value = (queries @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
    parts = []
    for head in range(4):
        one = slice(8 * head, 8 * head + 8)
        logits = query[..., one] @ key[..., one].mT / 8**0.5
        logits = logits + module.overlap_scale[head] * log_coverage(boxes)
        parts.append(logits.softmax(-1) @ value[..., one])
    expected = module.out_proj(torch.cat(parts, dim=-1))
    torch.testing.assert_close(module(queries, boxes), expected)
