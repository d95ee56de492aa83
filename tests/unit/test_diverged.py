"""A model whose outputs are not finite, in evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detrelay.core.data.augmentation import build_eval_transform
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import DetectionDataset, VisitSampler
from detrelay.core.engine.inference import detect
from detrelay.core.engine.loaders import make_loader
from detrelay.core.errors import NonFiniteOutput


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
