"""Sampling in the form that graphs are traced with."""

from __future__ import annotations

import pytest
import torch

from detrelay.core.ops.reference import sample_by_definition
from detrelay.core.ops.traced import sample_by_gather


@pytest.mark.parametrize("sums", [1, 3])
def test_sampling_for_graphs_equals_the_definition(sums: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (2, 3), (1, 1))
    cells = sum(height * width for height, width in shapes)
    values = torch.randn(2, cells, 4, 6, generator=generator, dtype=torch.float64)
    # beyond the borders too
    locations = 1.6 * torch.rand(2, 9, 4, sums, 3, 2, 2, generator=generator, dtype=torch.float64)
    locations -= 0.3
    weights = torch.randn(2, 9, 4, sums, 3, 2, generator=generator, dtype=torch.float64)
    found = sample_by_gather(values, shapes, locations, weights)
    expected = sample_by_definition(values, shapes, locations, weights)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
