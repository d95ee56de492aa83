"""Dynamic mixing: static adapters by hand, and which filters of the bank are reused."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from detrelay.heads.stageinteractor.config import MixingShape
from detrelay.heads.stageinteractor.mixing import DynamicMixing, FilterBank, StaticAdapter, _mix

SHAPE = MixingShape(
    dim=8,
    groups=2,
    base_points=2,
    pattern=2,
    out_points=6,
    reused=1,
    reuse_filters=True,
    reuse_spatial=False,
    adapter="full",
    has_bias=True,
)
SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize("way", ["axis", "pattern"])
def test_a_full_adapter_mixes_base_points_and_patterns(way: Literal["axis", "pattern"]) -> None:
    adapter = StaticAdapter(replace(SHAPE, dim=2))  # one channel a group
    adapter.get_submodule(way).weight.data = SWAP  # type: ignore[union-attr]
    features = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)  # points of a pattern together
    carried = torch.full((1, 1, 4, 1), 10.0)
    expected = {"axis": [13.0, 14.0, 11.0, 12.0], "pattern": [12.0, 11.0, 14.0, 13.0]}
    with torch.no_grad():
        assert adapter(features, carried).flatten().tolist() == expected[way]


def test_other_adapters() -> None:
    features, carried = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    adapter = StaticAdapter(replace(SHAPE, adapter="none"))
    assert not list(adapter.parameters())
    torch.testing.assert_close(adapter(features, carried), carried + features)
    adapter = StaticAdapter(replace(SHAPE, adapter="channel"))
    torch.testing.assert_close(adapter(features, carried), carried)  # starts at zero
    adapter.axis.weight.data, adapter.pattern.weight.data = torch.eye(4), 2 * torch.eye(4)
    torch.testing.assert_close(adapter(features, carried), carried + 3 * features)


@pytest.mark.parametrize("shape", [(1, 2, 3, 1), (1, 2, 1, 4)])
def test_products_are_normed_over_points_and_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    left, right, bias = torch.randn(1, 2, 3, 5), torch.randn(1, 2, 5, 4), torch.randn(shape)
    expected = F.layer_norm(left @ right + bias, (3, 4)).relu()
    torch.testing.assert_close(_mix(left, right, bias), expected)
    with torch.no_grad():  # other code runs
        torch.testing.assert_close(_mix(left, right, bias), expected)


def mixing(shape: MixingShape) -> DynamicMixing:
    torch.manual_seed(0)
    module = DynamicMixing(shape)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def test_the_newest_filters_are_applied_again_and_ones_own_are_handed_on() -> None:
    module = mixing(SHAPE)
    sampled, queries = torch.randn(3, 2, 4, 4), torch.randn(3, 8)
    old, new, other = torch.randn(3, 3, 2, 4, 4)
    mixed, bank = module(sampled, queries, FilterBank((old, new)))
    assert mixed.shape == (3, 8)
    assert len(bank.channel) == 3
    assert bank.channel[0] is old
    assert bank.channel[1] is new
    assert bank.spatial is not None
    assert bank.spatial.shape == (3, 2, 6, 4)
    torch.testing.assert_close(module(sampled, queries, FilterBank((other, new)))[0], mixed)
    changed = module(sampled, queries, FilterBank((old, other)))[0]
    assert not torch.allclose(changed, mixed)


def test_half_of_the_spatial_filters_are_blended_with_earlier_ones() -> None:
    module = mixing(replace(SHAPE, reused=0, reuse_spatial=True))
    for gate in (module.pattern_gate, module.point_gate):
        assert gate is not None
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.zeros_(gate.bias)
    sampled, queries = torch.randn(3, 2, 4, 4), torch.randn(3, 8)
    earlier = torch.randn(3, 2, 6, 4)
    _, bank = module(sampled, queries, FilterBank((), earlier))
    assert bank.spatial is not None
    own, blended = bank.spatial[:, :, :3], bank.spatial[:, :, 3:]
    # both gates are a half
    torch.testing.assert_close(blended, 0.75 * own + 0.25 * earlier[:, :, :3])


def test_static_mixing_is_the_adapters_without_the_filters() -> None:
    torch.manual_seed(0)
    shape = replace(SHAPE, reused=2, reuse_filters=False)
    mixing = DynamicMixing(shape).double()
    kinds = ("channel_gates", "channel_biases")
    assert not [name for name, _ in mixing.named_parameters() if name.split(".")[0] in kinds]
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rows, groups, points, width = 3, shape.groups, shape.points, shape.width
    sampled = torch.randn(rows, groups, points, width, dtype=torch.float64)
    queries = torch.randn(rows, shape.dim, dtype=torch.float64)
    patterns: list[torch.Tensor] = []
    mixing.out_proj.register_forward_pre_hook(lambda _, given: patterns.append(given[0]))
    mixing(sampled, queries, FilterBank())

    def normed(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)
        flat = (flat - flat.mean(-1, keepdim=True)) / (
            flat.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        return flat.view(x.shape).clamp(min=0)

    generated = mixing.generator(queries).view(rows, groups, -1)
    channel, spatial = generated.split([width**2, shape.out_points * points], dim=-1)
    biases = mixing.bias_generator(queries).view(rows, groups, -1)
    own = sampled @ channel.view(rows, groups, width, width) + biases[..., None, :width]
    mixed, carried = normed(own), sampled
    for adapter in mixing.adapters:
        grid = mixed.view(rows, groups, shape.base_points, shape.pattern, width)
        by_axis = adapter.axis(grid.transpose(2, 3).flatten(3)).unflatten(-1, (-1, width))
        by_pattern = adapter.pattern(grid.flatten(3)).unflatten(-1, (-1, width))
        carried = carried + (by_axis.transpose(2, 3) + by_pattern).flatten(2, 3)
        mixed = normed(carried)
    expected = spatial.view(rows, groups, shape.out_points, points) @ mixed
    expected = normed(expected + biases[..., width:, None])
    torch.testing.assert_close(patterns[0], expected.flatten(1))
