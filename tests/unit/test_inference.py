"""Detections in an image do not depend on the other images of its batch, nor on their number."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detrelay.apps.build import eval_data
from detrelay.core.data.augmentation import build_eval_transform
from detrelay.core.data.coco import Sample
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import DetectionDataset, VisitSampler
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.inference import detect
from detrelay.core.engine.loaders import make_eval_loader, make_loader
from detrelay.core.errors import NonFiniteOutput
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


class Outside(nn.Module):
    """Gives one box that reaches out of the image; scores as told."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> SimpleNamespace:
        boxes = torch.tensor([[[0.9, 0.5, 0.4, 0.5]]]).repeat(len(pixel_values), 1, 1)
        logits = torch.full((len(pixel_values), 1, 2), self.logit)
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


def found(logit: float) -> tuple[list[int], list[dict[str, Tensor]]]:
    samples = ShapesDataset(3, image_size=40, seed=0)
    processor = DetrelayImageProcessor()
    data = DetectionDataset(samples, build_eval_transform(40, 40), processor, seed=0)
    loader = make_loader(data, VisitSampler(3, seed=0, shuffle=False), 2)
    return detect(Accelerator(), Outside(logit), loader, processor, 10)


def test_a_diverged_model_is_told_with_the_images() -> None:
    ids = [entry["id"] for entry in ShapesDataset(3, image_size=40, seed=0).ground_truth["images"]]
    with pytest.raises(NonFiniteOutput, match="not finite") as error:
        found(float("nan"))
    assert f"image ids {ids[:2]}: training has diverged" in str(error.value)
    assert isinstance(error.value, ValueError)  # so that a command ends in one line


def test_evaluation_does_not_cut_boxes_to_the_image() -> None:
    _, results = found(2.0)
    sizes = ShapesDataset(3, image_size=40, seed=0)[0].original_size
    assert results[0]["boxes"][0, 2].item() == pytest.approx(1.1 * sizes[1])
