"""Images and boxes transformed together: mosaic and mixup."""

from __future__ import annotations

import pytest
import torch

from detrelay.core.data.geometry import make_mosaic, mix
from factories_data import assert_boxes_lie_on_bright_pixels, make_sample, marked_sample


def test_mosaic_joins_four_images_with_their_boxes() -> None:
    torch.manual_seed(0)
    sides = set()
    for _ in range(12):
        result = make_mosaic([marked_sample() for _ in range(4)], 70)  # each becomes 50 x 70
        assert result.image.shape == (3, 140, 140)
        assert result.image.dtype == torch.uint8
        assert_boxes_lie_on_bright_pixels(result, 8 * 140)
        assert len(result.class_labels) == len(result.boxes_xyxy) <= 8
        assert ((result.boxes_xyxy[:, 2:] - result.boxes_xyxy[:, :2]) > 0).all()
        sides.add(int((result.image == 114).all(0).sum()))
    assert len(sides) > 5  # the meeting point moves
    assert (result.image_id, result.original_size) == (7, (100, 140))


def test_images_of_a_mosaic_meet_in_the_order_given() -> None:
    samples = [make_sample(40, 40, [[0.0, 0.0, 40.0, 40.0]]) for _ in range(4)]
    for shade, sample in enumerate(samples):
        sample.image.fill_(10 * shade)
        sample.class_labels.fill_(shade)
    torch.manual_seed(3)
    result = make_mosaic(samples, 40)
    assert result.class_labels.tolist() == [0, 1, 2, 3]
    for shade, (left, top, right, bottom) in enumerate(result.boxes_xyxy.int().tolist()):
        assert (result.image[:, top:bottom, left:right] == 10 * shade).all()
    corners = result.boxes_xyxy
    meeting = corners[0, 2:]
    assert torch.equal(corners[3, :2], meeting)
    assert torch.equal(corners[1, [0, 3]], meeting)
    assert torch.equal(corners[2, [2, 1]], meeting)


def test_a_mixture_holds_both_images_and_all_boxes() -> None:
    first, second = make_sample(60, 80, seed=1), make_sample(90, 50, seed=2)
    torch.manual_seed(3)
    mixed = mix(first, second)
    assert mixed.image.shape == (3, 90, 80)
    assert torch.equal(mixed.boxes_xyxy, torch.cat([first.boxes_xyxy, second.boxes_xyxy]))
    assert mixed.class_labels.tolist() == [0, 1, 0, 1]
    # where only one of them is, its share can be read off; the shares sum to one
    alone = (mixed.image[:, :60, 50:].float() / first.image[:, :60, 50:].clamp(min=1)).median()
    other = (mixed.image[:, 60:, :50].float() / second.image[:, 60:].clamp(min=1)).median()
    assert 0 < alone < 1
    assert float(alone + other) == pytest.approx(1, abs=0.03)
    both = alone * first.image[:, :60, :50] + other * second.image[:, :60, :50]
    assert (mixed.image[:, :60, :50] - both).abs().max() < 4
