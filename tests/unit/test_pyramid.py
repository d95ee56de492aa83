"""Necks and pyramids."""

from __future__ import annotations

import copy

import pytest
import torch

import detrelay.heads  # registers the Auto classes  # noqa: F401
from detrelay.core.detector.pyramid import ChannelMapper, LevelMapper, build_pyramid, pad_to


@pytest.mark.parametrize("neck", [ChannelMapper([8], 32), LevelMapper([8], 2, 32)])
def test_necks_keep_their_digits_with_channels_last_maps(neck: torch.nn.Module) -> None:
    maps = torch.rand(1, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 20
    with torch.no_grad():
        levels = neck([maps.contiguous(memory_format=torch.channels_last)])
        exact = copy.deepcopy(neck).double()([maps.double()])
    for level, wanted in zip(levels, exact, strict=True):
        torch.testing.assert_close(level.double(), wanted, atol=3e-4, rtol=0)
        assert level.is_contiguous(memory_format=torch.channels_last)


def test_norms_of_channels_last_maps_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    neck = ChannelMapper([8], 64).double()
    for parameter in neck.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    maps = torch.randn(2, 8, 9, 7, dtype=torch.float64) + 3
    last = maps.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        (ours,), (plain,) = neck([last]), neck([maps])
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert last.equal(maps)  # the maps are not changed, only what the convolution made of them
    neck([last])[0].sum().backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


def test_extra_levels_halve_the_last_map() -> None:
    neck = LevelMapper([8, 16], 4, 32)
    maps = [torch.randn(1, channels, side, side) for channels, side in ((4, 32), (8, 16), (16, 8))]
    levels = neck(maps)
    assert [tuple(level.shape) for level in levels] == [
        (1, 32, side, side) for side in (16, 8, 4, 2)
    ]
    assert [conv.in_channels for conv in neck.convs] == [8, 16, 16, 32]


def test_images_are_padded_at_the_bottom_and_the_right() -> None:
    pixels, mask = torch.ones(1, 3, 5, 8), torch.ones(1, 5, 8)
    padded, real = pad_to(4, pixels), pad_to(4, mask)
    assert padded.shape == (1, 3, 8, 8)
    assert padded[:, :, :5].eq(1).all()
    assert not padded[:, :, 5:].any()
    assert torch.equal(real, padded[:, 0])
    assert pad_to(1, pixels) is pixels


def test_a_pyramid_knows_the_size_of_its_images() -> None:
    mask = torch.zeros(2, 8, 8)
    mask[0], mask[1, :4, :6] = 1, 1
    levels = [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 2, 2)]
    pyramid = build_pyramid(levels, (2, 4), mask)
    assert pyramid.image_sizes.tolist() == [[8, 8], [4, 6]]
    assert pyramid.valid[0][1].tolist() == [[True, True, True, False]] * 2 + [[False] * 4] * 2
    assert pyramid.valid[1][1].tolist() == [[True, True], [False, False]]
