"""Sampling of flattened levels: gradients, kernels, and what lies outside."""

from __future__ import annotations

import pytest
import torch

from detrelay.core.ops.reference import sample_by_definition
from detrelay.core.ops.token_sampling import (
    sample_by_kernel,
    sample_points,
    uses_kernel,
)

SHAPES = ((3, 4), (2, 2), (1, 2))
CELLS = 18


@pytest.mark.parametrize(("sums", "points"), [(1, 2), (3, 1)])
def test_gradients_of_sampling(sums: int, points: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(2, CELLS, 2, 3, dtype=torch.float64, requires_grad=True)
    # up to one and a half levels outside, where nothing is
    locations = 4 * torch.rand(2, 3, 2, sums, 3, points, 2, dtype=torch.float64) - 1.5
    weights = torch.randn(2, 3, 2, sums, 3, points, dtype=torch.float64, requires_grad=True)
    inputs = (values, locations.requires_grad_(), weights)
    assert torch.autograd.gradcheck(lambda v, at, w: sample_points(v, SHAPES, at, w), inputs)


def test_sampling_without_gradient_is_the_same() -> None:
    torch.manual_seed(2)
    values, weights = torch.randn(1, CELLS, 2, 3), torch.randn(1, 3, 2, 1, 3, 2)
    locations = torch.rand(1, 3, 2, 1, 3, 2, 2)
    plain = sample_points(values, SHAPES, locations, weights)
    assert torch.equal(sample_points(values.requires_grad_(), SHAPES, locations, weights), plain)


def test_sums_do_not_depend_on_how_many_are_computed_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    values, weights = torch.randn(2, CELLS, 2, 3), torch.randn(2, 7, 2, 1, 3, 2)
    locations = 2 * torch.rand(2, 7, 2, 1, 3, 2, 2) - 0.5
    at_once = sample_points(values, SHAPES, locations, weights)
    expected = sample_by_definition(values, SHAPES, locations, weights)
    torch.testing.assert_close(at_once, expected)
    for points in (20, 100):  # some sums of a slot, and some slots
        monkeypatch.setattr("detrelay.core.ops.token_sampling._POINTS_AT_A_TIME", points)
        assert torch.equal(sample_points(values, SHAPES, locations, weights), at_once)


@pytest.mark.parametrize("place", [torch.nan, torch.inf, -torch.inf])
def test_a_location_that_is_no_number_gives_nan(place: float) -> None:
    values, weights = torch.ones(1, CELLS, 1, 1), torch.ones(1, 2, 1, 1, 3, 1)
    locations = torch.full((1, 2, 1, 1, 3, 1, 2), 0.5)
    locations[0, 1] = place
    sampled = sample_points(values, SHAPES, locations, weights).flatten()
    assert sampled[0] == 3
    assert sampled[1].isnan()


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


def test_sums_without_points_are_zero() -> None:
    values = torch.randn(1, 4, 2, 3).requires_grad_()
    sampled = sample_points(
        values, ((2, 2),), torch.rand(1, 5, 2, 1, 1, 0, 2), torch.rand(1, 5, 2, 1, 1, 0)
    )
    assert torch.equal(sampled, torch.zeros(1, 5, 2, 1, 3))
    assert torch.equal(torch.autograd.grad(sampled.sum(), values)[0], torch.zeros_like(values))
