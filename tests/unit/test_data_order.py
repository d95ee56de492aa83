"""The batches of training: the same with any number of loader processes, and after a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from detrelay.core.data.augmentation import build_train_transform
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import DetectionDataset, Order
from detrelay.core.engine.batches import train_batches
from detrelay.core.recipes.recipe import DataConfig
from factories_data import assert_same_batches

BATCH = 2


def batches(
    num_workers: int, *, skip: int = 0, epoch: int = 1, order: str = "aspect", mosaic: float = 0.3
) -> list[Mapping[str, Any]]:
    """Batches of an epoch, read as the trainer reads them; a step has two of two images each."""
    samples = ShapesDataset(11, image_size=48)
    augmentation = DataConfig(
        short_sides=(32, 40), max_size=64, mosaic=mosaic, multi_scale_epochs=3, eval_short_side=48
    )
    data = DetectionDataset(
        samples,
        build_train_transform(augmentation),
        DetrelayImageProcessor(),
        seed=3,
        order=Order(
            ratios=(samples.sizes[:, 1] / samples.sizes[:, 0]).tolist(),
            aspect_group=BATCH,
            shape_group=BATCH if "shape" in order else 1,
        ),
        size_by_step="step" in order,
    )
    accelerator = Accelerator(cpu=True)
    found = train_batches(accelerator, data, BATCH, 2, num_workers=num_workers, divisor=32)
    found.take([accelerator.prepare(loader) for loader in found.unprepared])
    return list(found.epoch(epoch, skip))


@pytest.mark.parametrize("order", ["aspect", "shape", "step", "shape and step"])
def test_batches_do_not_depend_on_workers_or_on_where_an_epoch_is_taken_up(order: str) -> None:
    whole = batches(0, order=order)
    assert len(whole) == 5
    assert {batch["pixel_values"].dtype for batch in whole} == {torch.uint8}
    assert_same_batches(batches(0, skip=3, order=order), whole[3:])
    if order in ("aspect", "shape and step"):
        assert_same_batches(batches(2, skip=1, order=order), whole[1:])


def short_sides(found: list[Mapping[str, Any]]) -> list[set[int]]:
    return [{int(label["size"].min()) for label in batch["labels"]} for batch in found]


def test_images_of_a_batch_by_shape_share_their_size() -> None:
    shares = []
    for order in ("aspect", "shape"):
        found = batches(0, order=order, mosaic=0)
        shares.append(min(float(batch["pixel_mask"].float().mean()) for batch in found))
        short = short_sides(found)
        assert all(len(sides) == 1 for sides in short) == (order == "shape")
        assert {side for sides in short for side in sides} == {32, 40}
    assert shares[1] > shares[0]


@pytest.mark.parametrize("order", ["step", "shape and step"])
def test_images_of_a_step_share_their_size_until_its_epochs_end(order: str) -> None:
    steps = []
    for epoch in range(3):
        short = short_sides(batches(0, epoch=epoch, order=order, mosaic=0))
        steps += [short[0] | short[1], short[2] | short[3]]
    assert all(len(sides) == 1 for sides in steps)
    assert set.union(*steps) == {32, 40}
    assert set.union(*short_sides(batches(0, epoch=3, order=order, mosaic=0))) == {48}
