"""The definition of sampling, by hand."""

from __future__ import annotations

import torch

from detrelay.core.ops.reference import empty_sums, in_transform, sample_by_definition


def sampled(x: float, y: float) -> float:
    """Of a level 2 x 2 with the values 1, 2 above 4, 8, at a location in [0, 1]."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64).view(1, 4, 1, 1)
    at = torch.tensor([x, y], dtype=torch.float64).view(1, 1, 1, 1, 1, 1, 2)
    weights = torch.full((1, 1, 1, 1, 1, 1), 3.0, dtype=torch.float64)
    return sample_by_definition(values, ((2, 2),), at, weights).item()


def test_cells_have_their_value_in_the_middle() -> None:
    assert sampled(0.25, 0.25) == 3 * 1
    assert sampled(0.75, 0.25) == 3 * 2
    assert sampled(0.25, 0.75) == 3 * 4
    assert sampled(0.5, 0.5) == 3 * 15 / 4
    assert sampled(0.375, 0.25) == 3 * (0.75 * 1 + 0.25 * 2)


def test_outside_is_zero() -> None:
    assert sampled(0.0, 0.25) == 3 * 0.5
    assert sampled(0.25, 1.25) == 0


def test_groups_levels_and_points_add_up() -> None:
    values = torch.arange(1.0, 7.0).view(1, 3, 2, 1)  # two cells, then one; two groups
    at = torch.full((1, 1, 2, 1, 2, 2, 2), 0.5)
    weights = torch.ones(1, 1, 2, 1, 2, 2)
    found = sample_by_definition(values, ((1, 2), (1, 1)), at, weights)
    # two points per level: the mean of both cells, and the only cell
    assert found.flatten().tolist() == [2 * (2 + 5), 2 * (3 + 6)]


def test_sums_over_nothing_keep_the_graph() -> None:
    inputs = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    zeros = empty_sums((4,), *inputs)
    assert zeros.tolist() == [0] * 4
    for gradient in torch.autograd.grad(zeros.sum(), inputs):
        assert not gradient.any()


def test_transforms_of_functions_are_noticed() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_transform())
        return x

    function(torch.ones(2))
    torch.func.vmap(function)(torch.ones(2))
    assert seen == [False, True]
