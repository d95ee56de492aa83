"""Deformable attention against its equation, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detrelay.core.ops.deformable_attention import DeformableAttention

SHAPES = ((3, 4), (2, 2), (1, 2))
CELLS = 18


def by_loop(
    module: DeformableAttention, queries: Tensor, references: Tensor, values: Tensor, valid: Tensor
) -> Tensor:
    """Equation 3 of Deformable DETR, number by number."""
    batch, count, dim = queries.shape
    heads, levels, points = module.num_heads, module.num_levels, module.num_points
    width = dim // heads
    result = torch.zeros_like(queries)
    for b in range(batch):
        value = module.value_proj(values[b]) * valid[b][:, None]
        for q in range(count):
            offsets = module.sampling_offsets(queries[b, q]).view(heads, levels, points, 2)
            weights = module.attention_weights(queries[b, q]).view(heads, -1).softmax(-1)
            weights = weights.view(heads, levels, points)
            parts = []
            for m in range(heads):
                total = values.new_zeros(width)
                start = 0
                for level, (height, wide) in enumerate(SHAPES):
                    for k in range(points):
                        reference, offset = references[b, q, level], offsets[m, level, k]
                        if len(reference) == 2:
                            at = reference + offset / torch.tensor([wide, height])
                        else:
                            at = reference[:2] + offset / points * reference[2:] / 2
                        x, y = (at * torch.tensor([wide, height]) - 0.5).tolist()
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < height and 0 <= column < wide:
                                    share = (1 - abs(x - column)) * (1 - abs(y - row))
                                    cell = value[start + row * wide + column]
                                    cell = cell[m * width : (m + 1) * width]
                                    total = total + weights[m, level, k] * share * cell
                    start += height * wide
                parts.append(total)
            result[b, q] = module.output_proj(torch.cat(parts))
    return result


@pytest.mark.parametrize("size", [2, 4])
def test_attention_equals_plain_loop(size: int) -> None:
    torch.manual_seed(0)
    module = DeformableAttention(12, num_heads=3, num_levels=3, num_points=2).double()
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    queries = torch.randn(2, 4, 12, dtype=torch.float64)
    references = torch.rand(2, 4, 3, size, dtype=torch.float64)
    values = torch.randn(2, CELLS, 12, dtype=torch.float64)
    valid = torch.rand(2, CELLS) > 0.3
    with torch.no_grad():
        expected = by_loop(module, queries, references, values, valid)
        found = module(queries, references, values, SHAPES, valid)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_points_start_in_a_star() -> None:
    module = DeformableAttention(16, num_heads=8, num_levels=2, num_points=3)
    offsets = module.sampling_offsets(torch.randn(16)).view(8, 2, 3, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets[1, 0], torch.tensor([[1.0, 1.0], [2, 2], [3, 3]]))
    torch.testing.assert_close(offsets[4, 0], torch.tensor([[-1.0, 0], [-2, 0], [-3, 0]]))
