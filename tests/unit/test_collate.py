"""Padding a batch."""

from __future__ import annotations

import pytest
import torch

from detrelay.core.data.collate import EncodedSample, collate


def encoded(height: int, width: int) -> EncodedSample:
    return {
        "pixel_values": torch.rand(3, height, width) + 1,
        "labels": {"class_labels": torch.tensor([height]), "boxes": torch.rand(1, 4)},
    }


def test_images_stand_top_left_and_the_mask_says_where() -> None:
    items = [encoded(20, 33), encoded(31, 8)]
    batch = collate(items, divisor=16)
    assert batch["pixel_values"].shape == (2, 3, 32, 48)
    assert batch["pixel_mask"].dtype == torch.bool
    for row, (item, (height, width)) in enumerate(zip(items, [(20, 33), (31, 8)], strict=True)):
        image, mask = batch["pixel_values"][row], batch["pixel_mask"][row]
        assert torch.equal(image[:, :height, :width], item["pixel_values"])
        assert mask[:height, :width].all()
        assert mask.sum() == height * width
        assert (image[:, mask == 0] == 0).all()
        assert batch["labels"][row] is item["labels"]


def test_padding_is_written_whatever_stood_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    dirty = torch.full((2, 3, 32, 48), torch.nan)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_: dirty)
    batch = collate([encoded(20, 33), encoded(31, 8)], divisor=16)
    assert batch["pixel_values"] is dirty
    assert (dirty.isfinite()).all()
    assert ((dirty != 0).any(dim=1) == batch["pixel_mask"]).all()


def test_bytes_stay_channels_last_as_they_are_decoded() -> None:
    image = torch.randint(256, (20, 33, 3), dtype=torch.uint8).permute(2, 0, 1)
    batch = collate([{**encoded(20, 33), "pixel_values": image}], divisor=16)
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch["pixel_values"][0, :, :20, :33], image)
    assert batch["pixel_values"][0].sum() == image.sum()


def test_divisor_is_32_by_default() -> None:
    assert collate([encoded(33, 20)])["pixel_values"].shape == (1, 3, 64, 32)
