"""Sampling of feature maps against `grid_sample`, and agreement with its counterpart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detrelay.core.ops import point_sampling
from detrelay.core.ops.point_sampling import channels_last_maps, sample_maps
from detrelay.core.ops.token_sampling import flatten_levels, sample_points

Sampling = Callable[[list[Tensor], Tensor, Tensor], Tensor]

SHAPES = ((6, 8), (3, 4))
BATCH, QUERIES, GROUPS, POINTS, WIDTH = 2, 5, 2, 4, 3


def case(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options: Any = {"generator": generator, "dtype": torch.float64}
    levels = [torch.randn(BATCH, GROUPS * WIDTH, *shape, **options) for shape in SHAPES]
    lead = (len(SHAPES), BATCH, QUERIES, GROUPS, POINTS)
    # some points lie outside, where everything is zero
    locations = 1.4 * torch.rand(2, *lead, **options) - 0.2
    return levels, locations, torch.rand(*lead, **options)


def by_grid_sample(levels: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """The same sums through `grid_sample`, one level and group at a time."""
    total = torch.zeros(BATCH, QUERIES, GROUPS, POINTS, WIDTH, dtype=torch.float64)
    for index, level in enumerate(levels):
        for group in range(GROUPS):
            maps = level[:, group * WIDTH : (group + 1) * WIDTH]
            grid = 2 * locations[:, index, :, :, group].movedim(0, -1) - 1  # [B, Q, N, 2]
            sampled = F.grid_sample(maps, grid, align_corners=False)  # [B, D, Q, N]
            weighted = sampled * weights[index, :, None, :, group]
            total[:, :, group] += weighted.permute(0, 2, 3, 1)
    return total


def test_sums_and_gradients_equal_grid_sample() -> None:
    levels, locations, weights = case()
    leaves = [*levels, locations, weights]
    for leaf in leaves:
        leaf.requires_grad_()
    ours = sample_maps(channels_last_maps(levels, GROUPS), locations, weights)
    reference = by_grid_sample(levels, locations, weights)
    torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)
    seed = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, seed),
        torch.autograd.grad(reference, leaves, seed),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_levels_too_large_for_int32_are_sampled_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, locations, weights = case()
    maps = channels_last_maps(levels, GROUPS)
    expected = sample_maps(maps, locations, weights)
    kinds = []
    embedding_bag = F.embedding_bag

    def watched(rows: Tensor, *args: Any, **options: Any) -> Tensor:
        kinds.append(rows.dtype)
        return embedding_bag(rows, *args, **options)

    monkeypatch.setattr(F, "embedding_bag", watched)
    monkeypatch.setattr(point_sampling, "_INT32_ROWS", 6 * 8 * GROUPS * BATCH - 1)
    assert torch.equal(sample_maps(maps, locations, weights), expected)
    assert set(kinds) == {torch.int64}


def test_channels_last_levels_are_not_copied() -> None:
    level = torch.randn(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    (maps,) = channels_last_maps([level], groups=2)
    assert maps.shape == (2, 4, 5, 2, 3)
    assert maps.data_ptr() == level.data_ptr()


def as_sums(values: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    """`sample_maps` of the case, through the counterpart for flattened levels."""
    flat, shapes = flatten_levels(values)
    at = locations.permute(2, 3, 4, 5, 1, 0)[..., None, :]
    by_sum = weights.movedim(0, -1)[..., None]
    return sample_points(flat.unflatten(-1, (GROUPS, -1)), shapes, at, by_sum)


def as_maps(values: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
    return sample_maps(channels_last_maps(values, GROUPS), locations, weights)


SAMPLINGS = pytest.mark.parametrize("sample", [as_maps, as_sums])


@SAMPLINGS
def test_a_nan_location_spoils_only_its_own_sum(sample: Sampling) -> None:
    levels, locations, weights = case()
    whole = sample(levels, locations, weights)
    locations[1, 0, 1, 2, 1, 3] = torch.nan
    locations[0, 1, 0, 4, 0, 0] = torch.inf
    spoilt = sample(levels, locations, weights)
    bad = torch.zeros(whole.shape[:-1], dtype=torch.bool)
    bad[1, 2, 1, 3] = bad[0, 4, 0, 0] = True
    assert spoilt[bad].isnan().all()
    assert torch.equal(spoilt[~bad], whole[~bad])


@SAMPLINGS
def test_second_derivatives_equal_differences(sample: Sampling) -> None:
    levels, locations, weights = case()
    inputs = [tensor.requires_grad_() for tensor in (*levels, locations[:, :, :, :1], weights)]

    def function(*tensors: Tensor) -> Tensor:
        return sample([*tensors[:2]], tensors[2], tensors[3][:, :, :1])

    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@SAMPLINGS
def test_transforms_of_functions(sample: Sampling) -> None:
    levels, locations, weights = case()

    def total(weights: Tensor) -> Tensor:
        return sample(levels, locations, weights).square().sum()

    (expected,) = torch.autograd.grad(total(weights.requires_grad_()), weights)
    torch.testing.assert_close(torch.func.grad(total)(weights.detach()), expected)
    many = torch.stack([weights.detach(), 2 * weights.detach()])
    alone = torch.stack([total(each) for each in many])
    torch.testing.assert_close(torch.func.vmap(total)(many), alone)


@SAMPLINGS
@pytest.mark.parametrize("empty", ["images", "queries", "points"])
def test_sums_of_nothing(sample: Sampling, empty: str) -> None:
    levels, locations, weights = case()
    if empty == "images":
        levels = [level[:0] for level in levels]
        locations, weights = locations[:, :, :0], weights[:, :0]
    elif empty == "queries":
        locations, weights = locations[:, :, :, :0], weights[:, :, :0]
    else:
        locations, weights = locations[..., :0], weights[..., :0]
    leaves = [tensor.requires_grad_() for tensor in (*levels, locations, weights)]
    sampled = sample(leaves[:2], leaves[2], leaves[3])
    assert sampled.shape == (*weights.shape[1:], WIDTH)
    for grad, leaf in zip(torch.autograd.grad(sampled.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))
