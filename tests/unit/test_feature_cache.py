"""The cache of what a frozen backbone makes of images: the same run, with less work."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from detrelay.core.backbones import ResNetBackbone
from detrelay.core.data.augmentation import build_train_transform
from detrelay.core.data.collate import collate
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.sample import Sample
from detrelay.core.data.transforms import DetectionDataset
from detrelay.core.engine.failure import load_failure, save_failure
from detrelay.core.engine.feature_cache import CachedFeatures, FeatureMemory, refuse_learning
from detrelay.core.engine.inference import model_inputs
from detrelay.core.engine.logging import read_metrics
from detrelay.core.recipes.recipe import DataConfig
from detrelay.heads import HEADS
from factories import small_head_config
from tiny_run import final_weights, tiny_run

FROZEN = ("model.backbone_norm=frozen", "model.backbone_frozen_stages=4")
CACHED = (*FROZEN, "train.feature_cache_gib=1.0")


pytestmark = pytest.mark.usefixtures("small_and_silent")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the backbone saw."""
    seen: list[int] = []
    forward = ResNetBackbone.forward

    def counted(self: ResNetBackbone, pixel_values: torch.Tensor) -> Any:
        seen.append(len(pixel_values))
        return forward(self, pixel_values)

    monkeypatch.setattr(ResNetBackbone, "forward", counted)
    return seen


def figures(output: Path) -> list[dict[str, float]]:
    """Losses and size of the gradient in each step."""
    rows = read_metrics(output / "metrics.jsonl")
    return [{**row["losses"], "norm": row["gradient_norm"]} for row in rows if "losses" in row]


def test_a_run_is_the_same_with_each_image_computed_once(tmp_path: Path, passes: list[int]) -> None:
    assert tiny_run(tmp_path / "plain", *FROZEN, "train.epochs=6") == 0
    without = sum(passes)
    passes.clear()
    assert tiny_run(tmp_path / "cached", *CACHED, "train.epochs=6") == 0
    assert without == 6 * 12 + 6 * 3  # 14 images in steps of 4, and 3 to evaluate on
    assert sum(passes) == len(passes) <= 2 * 14 + 3
    plain, cached = figures(tmp_path / "plain"), figures(tmp_path / "cached")
    assert len(plain) == 18
    # a convolution of four images rounds otherwise than four of one
    for expected, found in zip(plain, cached, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_and_one_without_room_end_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert tiny_run(tmp_path / "whole", *CACHED, "train.epochs=4") == 0
    assert tiny_run(tmp_path / "parts", *CACHED, "train.epochs=2") == 0
    more = "train.epochs=4"
    with caplog.at_level(logging.WARNING):
        little = "train.feature_cache_gib=1e-5"
        assert tiny_run(tmp_path / "parts", more, little, resume=True) == 0
    told = [record.getMessage() for record in caplog.records if "cache is full" in str(record.msg)]
    assert len(told) == 1
    whole, parts = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((*CACHED, "data.color_jitter=0.1"), "color_jitter (in data) is none of flip, first, and"),
        ((*CACHED, "data.short_sides=[48,64]"), "data.short_sides is a choice of 2 sizes"),
        ((*CACHED, "data.mosaic=0.5"), "mosaic (in data) is none of flip, first, and resize"),
        (("train.feature_cache_gib=1.0",), "parameters of the backbone learn, such as"),
    ],
)
def test_what_is_not_exact_is_refused_in_one_line(
    settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"train\.feature_cache_gib=0") as refused:
        tiny_run(tmp_path / "run", *settings)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_backbone_that_is_random_or_learns_its_statistics_is_refused() -> None:
    refuse_learning(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.0)).requires_grad_(False))
    for part in (nn.Dropout(0.1), nn.BatchNorm2d(4)):
        network = nn.Sequential(nn.Conv2d(3, 4, 1), part).requires_grad_(False).eval()
        with pytest.raises(ValueError, match="1 of the backbone gives other numbers in each step"):
            refuse_learning(network)
        assert not network.training


class _Images:
    """Images of several shapes with an object each."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        self.shapes = shapes

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        shape = self.shapes[index]
        image = torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8)
        boxes, labels = torch.tensor([[4.0, 8.0, 24.0, 32.0]]), torch.tensor([index % 4])
        return Sample(image, boxes, labels, index, shape)


def cached_data() -> CachedFeatures:
    config = small_head_config("stageinteractor", backbone_norm="frozen", backbone_frozen_stages=4)
    model = HEADS["stageinteractor"].model(config).double().train()
    transform = build_train_transform(DataConfig(short_sides=(40,), max_size=80))
    samples: Any = _Images((40, 50), (60, 40), (50, 40), (40, 72))
    data = DetectionDataset(samples, transform, DetrelayImageProcessor(), seed=3)
    return CachedFeatures(data, model, Accelerator(cpu=True), FeatureMemory(2**30))


def test_maps_are_those_of_the_padded_batch_whatever_it_is_padded_to() -> None:
    cached = cached_data()
    flips = set()
    for visits in ((0, 1), (4, 6, 7), (8, 9), (11, 12, 13), (0, 1), (4, 7)):
        variants = [cached[visit] for visit in visits]
        flips |= set(variants)
        batch = cached.collate(variants, divisor=32)
        plain = collate([cached.data[visit] for visit in visits], divisor=32)
        assert torch.equal(batch["pixel_mask"], plain["pixel_mask"])
        with torch.no_grad():
            expected = cached._model.backbone_maps(plain["pixel_values"])
        for level, other in zip(batch["feature_maps"], expected, strict=True):
            torch.testing.assert_close(level, other, rtol=1e-12, atol=1e-12)
        for label, other in zip(batch["labels"], plain["labels"], strict=True):
            assert all(torch.equal(value, other[key]) for key, value in label.items())
    assert {flip for _, flip in flips} == {False, True}


def test_gradients_are_those_of_pixels_and_a_failed_step_keeps_its_maps(tmp_path: Path) -> None:
    cached = cached_data()
    model = cached._model.eval()
    variants = [cached[visit] for visit in (0, 1)]
    batch = cached.collate(variants, divisor=32)
    pixels = collate([cached.data[visit] for visit in (0, 1)], divisor=32)
    gradients = []
    for inputs in (model_inputs(batch), model_inputs(pixels)):
        model.zero_grad()
        model(**inputs, labels=batch["labels"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    cached_gradients, plain = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="feature_maps need the pixel_mask"):
        model(feature_maps=batch["feature_maps"])
    with pytest.raises(ValueError, match="expected pixel_values, or feature_maps"):
        model(pixel_mask=batch["pixel_mask"])
    file = save_failure(Accelerator(cpu=True), tmp_path / "step", model, [batch], {}, {})
    (again,), _ = load_failure(file)
    pairs = zip(again["feature_maps"], batch["feature_maps"], strict=True)
    assert all(torch.equal(level, other) for level, other in pairs)
