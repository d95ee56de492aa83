from __future__ import annotations

import pytest
import torch
import torchvision

from detrelay.core.boxes import cxcywh_to_xyxy, giou, iou, xyxy_to_cxcywh


def test_overlaps_of_hand_computed_boxes() -> None:
    first = torch.tensor([0.0, 0.0, 2.0, 2.0])
    second = torch.tensor([1.0, 1.0, 3.0, 3.0])
    assert iou(first, second).item() == pytest.approx(1 / 7)
    # hull 3 x 3 = 9, union 7
    assert giou(first, second).item() == pytest.approx(1 / 7 - 2 / 9)
    apart = torch.tensor([4.0, 0.0, 6.0, 2.0])
    assert iou(first, apart).item() == 0
    assert giou(first, apart).item() == pytest.approx(-4 / 12)


def test_overlaps_broadcast_to_pairs_like_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    first = torch.cat([low, low + torch.rand(5, 2, generator=generator)], 1)
    second = first.flip(0) * 0.9
    torch.testing.assert_close(
        iou(first[:, None], second[None]), torchvision.ops.box_iou(first, second)
    )
    torch.testing.assert_close(
        giou(first[:, None], second[None]), torchvision.ops.generalized_box_iou(first, second)
    )


def test_overlaps_do_not_depend_on_the_unit() -> None:
    first = torch.tensor([[0.1, 0.2, 0.4, 0.9]], dtype=torch.float64)
    second = torch.tensor([[0.2, 0.1, 0.5, 0.6]], dtype=torch.float64)
    pixels = torch.tensor([1333.0, 800.0, 1333.0, 800.0], dtype=torch.float64)
    torch.testing.assert_close(iou(first, second), iou(first * pixels, second * pixels))
    torch.testing.assert_close(giou(first, second), giou(first * pixels, second * pixels))


def test_empty_boxes_stay_finite() -> None:
    nothing = torch.zeros(1, 4, requires_grad=True)
    value = giou(nothing, torch.zeros(1, 4))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(nothing.grad).all()


def test_formats_round_trip() -> None:
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)
