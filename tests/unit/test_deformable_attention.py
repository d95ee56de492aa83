from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detrelay.core.ops.deformable_attention import DeformableAttention
from detrelay.core.ops.position_encoding import grid_position_code, sine_code
from detrelay.core.ops.token_sampling import sample_by_kernel, sample_points, uses_kernel

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


@pytest.mark.parametrize(("sums", "points"), [(1, 2), (3, 1)])
def test_gradients_of_sampling(sums: int, points: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(2, CELLS, 2, 3, dtype=torch.float64, requires_grad=True)
    # up to half a level outside, where nothing is
    locations = 2 * torch.rand(2, 3, 2, sums, 3, points, 2, dtype=torch.float64) - 0.5
    weights = torch.randn(2, 3, 2, sums, 3, points, dtype=torch.float64, requires_grad=True)
    inputs = (values, locations.requires_grad_(), weights)
    assert torch.autograd.gradcheck(lambda v, at, w: sample_points(v, SHAPES, at, w), inputs)


def test_sampling_without_gradient_is_the_same() -> None:
    torch.manual_seed(2)
    values, weights = torch.randn(1, CELLS, 2, 3), torch.randn(1, 3, 2, 1, 3, 2)
    locations = torch.rand(1, 3, 2, 1, 3, 2, 2)
    plain = sample_points(values, SHAPES, locations, weights)
    assert torch.equal(sample_points(values.requires_grad_(), SHAPES, locations, weights), plain)


def test_location_that_is_no_number_gives_none() -> None:
    values, weights = torch.ones(1, CELLS, 1, 1), torch.ones(1, 2, 1, 1, 3, 1)
    locations = torch.full((1, 2, 1, 1, 3, 1, 2), 0.5)
    locations[0, 1] = torch.nan
    sampled = sample_points(values, SHAPES, locations, weights).flatten()
    assert sampled[0] == 3
    assert sampled[1].isnan()


def test_points_start_in_a_star() -> None:
    module = DeformableAttention(16, num_heads=8, num_levels=2, num_points=3)
    offsets = module.sampling_offsets(torch.randn(16)).view(8, 2, 3, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets[1, 0], torch.tensor([[1.0, 1.0], [2, 2], [3, 3]]))
    torch.testing.assert_close(offsets[4, 0], torch.tensor([[-1.0, 0], [-2, 0], [-3, 0]]))


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


def test_kernel_package_takes_our_arguments() -> None:
    pytest.importorskip("deformops", reason="needs the extra `kernels` (Python 3.12 or newer)")
    torch.manual_seed(6)
    values = torch.randn(2, CELLS, 3, 4, dtype=torch.float64)
    locations = 1.2 * torch.rand(2, 5, 3, 1, 3, 2, 2, dtype=torch.float64) - 0.1
    weights = torch.rand(2, 5, 3, 1, 3, 2, dtype=torch.float64)
    expected = sample_points(values, SHAPES, locations, weights)
    sampled = sample_by_kernel(values, SHAPES, locations[:, :, :, 0], weights[:, :, :, 0])
    torch.testing.assert_close(sampled, expected, atol=1e-12, rtol=0)


def test_kernels_serve_cuda_in_single_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detrelay.core.ops.token_sampling._has_deformops", lambda: True)
    assert uses_kernel(torch.device("cuda"), torch.float32)
    assert uses_kernel(torch.device("cuda"), torch.bfloat16)
    assert not uses_kernel(torch.device("cuda"), torch.float64)
    assert not uses_kernel(torch.device("cpu"), torch.float32)
