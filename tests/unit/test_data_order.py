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
from detrelay.core.data.transforms import DetectionDataset
from detrelay.core.engine.loaders import make_loader
from detrelay.core.recipes.recipe import DataConfig

BATCH = 2


def batches(
    num_workers: int, *, skip: int = 0, by_shape: bool = False, mosaic: float = 0.3
) -> list[Mapping[str, Any]]:
    """Batches of the second epoch, read as the trainer reads them."""
    samples = ShapesDataset(11, image_size=48)
    augmentation = DataConfig(short_sides=(32, 40), max_size=64, mosaic=mosaic)
    data = DetectionDataset(
        samples,
        build_train_transform(augmentation),
        DetrelayImageProcessor(),
        seed=3,
        mosaic=augmentation.mosaic,
        mosaic_tile=augmentation.mosaic_tile,
        wide=[image["width"] >= image["height"] for image in samples.ground_truth["images"]],
        aspect_group=BATCH,
        ratios=(samples.sizes[:, 1] / samples.sizes[:, 0]).tolist(),
        shape_group=BATCH if by_shape else 1,
    )
    accelerator, sampler = Accelerator(cpu=True), data.sampler()
    loader = accelerator.prepare(
        make_loader(data, sampler, BATCH, num_workers=num_workers, drop_last=True)
    )
    loader.set_epoch(1)
    sampler.set_epoch(1)
    return list(accelerator.skip_first_batches(loader, skip) if skip else loader)


def assert_same(found: list[Mapping[str, Any]], expected: list[Mapping[str, Any]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        for first, second in zip(one["labels"], other["labels"], strict=True):
            assert torch.equal(first["image_id"], second["image_id"])
            assert torch.equal(first["boxes"], second["boxes"])


@pytest.mark.parametrize("by_shape", [False, True])
def test_batches_do_not_depend_on_workers_or_on_where_an_epoch_is_taken_up(by_shape: bool) -> None:
    whole = batches(0, by_shape=by_shape)
    assert len(whole) == 5
    assert {batch["pixel_values"].dtype for batch in whole} == {torch.uint8}
    assert_same(batches(2, by_shape=by_shape), whole)
    assert_same(batches(0, skip=3, by_shape=by_shape), whole[3:])
    if not by_shape:
        assert_same(batches(2, skip=1), whole[1:])


def test_images_of_a_batch_by_shape_share_their_size() -> None:
    shares = []
    for by_shape in (False, True):
        found = batches(0, by_shape=by_shape, mosaic=0)
        shares.append(min(float(batch["pixel_mask"].float().mean()) for batch in found))
        short = [{int(label["size"].min()) for label in batch["labels"]} for batch in found]
        assert all(len(sides) == 1 for sides in short) == by_shape
        assert {side for sides in short for side in sides} == {32, 40}
    assert shares[1] > shares[0]
