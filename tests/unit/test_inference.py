"""What is found in an image does not depend on the images beside it, nor on how many they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from detrelay.apps.build import eval_data
from detrelay.core.data.coco import Sample
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.transforms import ShapeBatches
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.inference import detect
from detrelay.core.engine.loaders import make_eval_loader
from detrelay.core.evaluation.coco_ap import CocoResult, detections_from_results, evaluate_coco
from detrelay.heads import HEADS
from factories import SMALL_HEADS, small_head_config
from factories_data import noise_image
from tiny_run import TinyBlocks, shrink_backbone

# (height, width): four shapes after padding, the first and the last of one image only
SIZES = np.array([(40, 64), (32, 32), (33, 60), (60, 33), (33, 64), (64, 40), (30, 32), (32, 100)])


class Images:
    """Noise of several sizes."""

    sizes = SIZES

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index: int) -> Sample:
        height, width = SIZES[index].tolist()
        pixels = torch.from_numpy(np.array(noise_image(width, height, seed=index)))
        return Sample(
            image=pixels.permute(2, 0, 1),
            boxes_xyxy=torch.zeros(0, 4),
            class_labels=torch.zeros(0, dtype=torch.int64),
            image_id=70 - index,
            original_size=(height, width),
        )


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch, TinyBlocks)
        yield


def make_model(case: str) -> DetectorForObjectDetection:
    torch.manual_seed(0)
    model = HEADS[SMALL_HEADS[case][0]].model(small_head_config(case, d_model=64))
    for parameter in model.parameters():  # off the values at which many paths are silent
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def find(case: str, batch_size: int, divisor: int) -> tuple[list[int], list[dict[str, Any]]]:
    processor = DetrelayImageProcessor(
        size={"shortest_edge": 40, "longest_edge": 90}, pad_size_divisor=divisor
    )
    data = eval_data(Images(), processor)  # type: ignore[arg-type]  # as far as it is read
    loader = make_eval_loader(data, batch_size, divisor)
    return detect(Accelerator(cpu=True), make_model(case), loader, processor, 20)


def score(ids: list[int], results: list[dict[str, Any]]) -> CocoResult:
    """AP against a truth that a few of the detections of one image at a time are."""
    found = detections_from_results(results, ids, [1, 2, 3, 4])
    truth = [
        {"id": number, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3], **row}
        for number, row in enumerate(found[::7], start=1)
        if row["bbox"][2] > 0 and row["bbox"][3] > 0
    ]
    images = [
        {"id": 70 - index, "height": height, "width": width, "file_name": f"{index}.png"}
        for index, (height, width) in enumerate(SIZES.tolist())
    ]
    categories = [{"id": number, "name": str(number)} for number in (1, 2, 3, 4)]
    content = {"images": images, "annotations": truth, "categories": categories}
    return evaluate_coco(content, found)


@pytest.mark.parametrize("divisor", [1, 32])
@pytest.mark.parametrize(
    "case", ["stageinteractor", "deformable_detr_two_stage", "dn_detr", "dino"]
)
def test_results_do_not_depend_on_the_size_of_batches(case: str, divisor: int) -> None:
    ids, alone = find(case, 1, divisor)
    assert ids == sorted(70 - index for index in range(len(SIZES)))
    figures = score(ids, alone)
    for batch_size in (3, 8):
        again, together = find(case, batch_size, divisor)
        assert again == ids
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other["scores"], one["scores"], atol=1e-6, rtol=0)
            torch.testing.assert_close(other["boxes"], one["boxes"], atol=1e-3, rtol=1e-6)
            assert torch.equal(other["labels"], one["labels"])
        stats = score(again, together).stats
        assert stats.keys() == figures.stats.keys()
        for name, value in figures.stats.items():
            assert stats[name] == pytest.approx(value, abs=1e-6)
    assert 0 < figures.stats["AP"] < 1


def test_images_of_one_padded_shape_share_batches() -> None:
    shapes = [(32, 64), (32, 32), (32, 64), (64, 32), (32, 64), (64, 32)]
    assert list(ShapeBatches(shapes, 2)) == [[0, 2], [1], [3, 5], [4]]
    assert list(ShapeBatches(shapes, 8)) == [[0, 2, 4], [1], [3, 5]]
    assert list(ShapeBatches(shapes, 1)) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_share_batches_and_have_equally_many(processes: int) -> None:
    shapes = [(32, 64), (32, 32), (32, 64), (64, 32), (32, 64)]
    shares = [
        list(ShapeBatches(shapes, 2, process=process, num_processes=processes))
        for process in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for batch in share for index in batch} == set(range(5))
