"""Transforms by name: the list means what the settings mean, and takes one's own."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.augmentation import Crop, build_train_transform
from detrelay.core.data.coco import Sample
from detrelay.core.data.geometry import on_both, random_crop, resize, scale
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import DataConfig, Recipe, override
from factories_data import make_sample

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sizes": {"short_sides": (40, 48, 56), "max_size": 70},
    "crop": {
        "short_sides": (40, 48),
        "max_size": 70,
        "crop": True,
        "crop_short_sides": (30, 50),
        "crop_range": (20, 40),
    },
    "jitter": {"jitter_size": 60, "jitter_range": (0.5, 2.0), "color_jitter": 0.3},
    "never flipped": {"flip_probability": 0.0, "short_sides": (33,), "color_jitter": 0.1},
}


def by_hand(sample: Sample, config: DataConfig) -> Sample:
    """What the settings say, in one piece: the random numbers come in this order."""

    def choose(sizes: tuple[int, ...]) -> int:
        return sizes[int(torch.randint(len(sizes), ()))]

    if torch.rand(()) < config.flip_probability:
        sample = on_both(tv_functional.horizontal_flip, sample)
    if config.jitter_size:
        low, high = config.jitter_range
        factor = low + (high - low) * float(torch.rand(()))
        sample = scale(sample, factor * config.jitter_size / max(sample.image.shape[-2:]))
        sample = random_crop(sample, config.jitter_size, config.jitter_size)
    else:
        if config.crop and torch.rand(()) < 0.5:
            sample = resize(sample, choose(config.crop_short_sides), None)
            sample = random_crop(sample, *config.crop_range)
        sample = resize(sample, choose(config.short_sides), config.max_size)
    change = config.color_jitter
    if change > 0:
        sample = replace(sample, image=v2.ColorJitter(change, change, change)(sample.image))
    return sample


def repeat(transform: Any, seeds: range = range(12)) -> list[Sample]:
    results = []
    for seed in seeds:
        torch.manual_seed(seed)
        results.append(transform(make_sample(60, 80)))
    return results


def assert_same(found: list[Sample], expected: list[Sample]) -> None:
    for first, second in zip(found, expected, strict=True):
        assert torch.equal(first.image, second.image)
        assert torch.equal(first.boxes_xyxy, second.boxes_xyxy)
        assert torch.equal(first.class_labels, second.class_labels)


@pytest.mark.parametrize("case", sorted(SETTINGS))
def test_settings_without_a_list_give_the_same_images_as_ever(case: str) -> None:
    config = DataConfig(**SETTINGS[case])
    assert_same(repeat(build_train_transform(config)), repeat(lambda s: by_hand(s, config)))


def test_a_list_of_names_takes_its_numbers_from_the_settings() -> None:
    config = DataConfig(**SETTINGS["crop"])
    listed = replace(config, transforms=tuple({"name": n} for n in ("flip", "crop", "resize")))
    assert_same(repeat(build_train_transform(listed)), repeat(build_train_transform(config)))
    window = {"probability": 1.0, "short_sides": [30], "window": [10, 12]}
    fixed = replace(config, transforms=({"name": "crop", **window},))
    sides = {side for s in repeat(build_train_transform(fixed)) for side in s.image.shape[-2:]}
    assert sides == {10, 11, 12}


@dataclass(frozen=True)
class Grey:
    level: int

    def __call__(self, sample: Sample) -> Sample:
        return replace(sample, image=torch.full_like(sample.image, self.level))


def test_ones_own_transform_stands_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("my_transforms")
    mine.Grey = Grey  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_transforms", mine)
    setting = 'data.transforms=[{name="flip"}, {name="my_transforms:Grey", level=7}]'
    config = override(Recipe(), [setting]).data
    transform = pickle.loads(pickle.dumps(build_train_transform(config)))
    result = transform(make_sample(60, 80))
    assert result.image.unique().tolist() == [7]
    assert result.image.shape == (3, 60, 80)


def test_a_recipe_with_a_list_reads_back_equal() -> None:
    recipe = override(Recipe(), ['data.transforms=[{name="resize", short_sides=[64, 80]}]'])
    assert Recipe.from_mapping(recipe.to_mapping(), "record") == recipe
    assert 'name = "resize"' in recipe.to_toml()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transforms": ({"name": "flop"},)}, "unknown transform 'flop'; did you mean 'flip'"),
        ({"transforms": ({"probability": 1.0},)}, "each entry needs a name"),
        (
            {"transforms": ({"name": "resize", "max_sise": 9},)},
            "transform 'resize' has no option 'max_sise'; did you mean 'max_size'",
        ),
        (
            {"transforms": ({"name": "flip"},), "crop": True},
            "leaves out crop, which other settings of data ask for",
        ),
        (
            {"transforms": ({"name": "flip"},), "jitter_size": 64, "color_jitter": 0.1},
            "leaves out scale_jitter, color_jitter",
        ),
    ],
)
def test_lists_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_train_transform(DataConfig(**changes))


STRONG = (
    {"name": "photometric_distort", "probability": 1.0},
    {"name": "iou_crop", "probability": 1.0},
)


def test_photometric_distortion_changes_colours_only() -> None:
    sample = make_sample()
    transform = build_train_transform(
        DataConfig(transforms=(STRONG[0],), flip_probability=0.5, short_sides=(60,))
    )
    torch.manual_seed(0)
    changed = transform(sample)
    assert torch.equal(changed.boxes_xyxy, sample.boxes_xyxy)
    assert changed.image.shape == sample.image.shape
    assert changed.image.dtype == torch.uint8
    assert not torch.equal(changed.image, sample.image)


def test_iou_crop_keeps_boxes_on_their_pixels() -> None:
    # an image whose pixels say where they are: red is the column, green the row
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    pixels = torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)
    sample = replace(make_sample(), image=pixels)
    transform = build_train_transform(DataConfig(transforms=(STRONG[1],)))
    sizes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        cropped = transform(sample)
        assert type(cropped.image) is type(cropped.boxes_xyxy) is torch.Tensor
        left, top = cropped.image[0, 0, 0].item(), cropped.image[1, 0, 0].item()
        height, width = cropped.image.shape[-2:]
        sizes.add((height, width))
        assert 0 < len(cropped.boxes_xyxy) == len(cropped.class_labels)
        limit = torch.tensor([width, height, width, height])
        for box, label in zip(cropped.boxes_xyxy, cropped.class_labels.tolist(), strict=True):
            whole = sample.boxes_xyxy[label] - torch.tensor([left, top, left, top])
            assert torch.equal(box, torch.minimum(whole.clamp(min=0), limit))
    assert len(sizes) > 5
    empty = make_sample(boxes=[])
    assert transform(empty) is empty


def test_strong_transforms_are_left_out_late() -> None:
    listed = (*STRONG, {"name": "resize", "short_sides": [30]})
    config = DataConfig(transforms=listed)
    late = build_train_transform(config, strong=False)
    sample = make_sample()
    assert_same([late(sample)], [resize(sample, 30, config.max_size)])


def test_half_of_the_images_are_cropped() -> None:
    sample, crop = make_sample(24, 32), Crop(short_sides=(30,), window=(10, 20))
    draws, cut = [], []
    for seed in range(300):
        torch.manual_seed(seed)
        draws.append(float(torch.rand(())))
        torch.manual_seed(seed)
        cut.append(crop(sample) is not sample)
    assert cut == [draw < 0.5 for draw in draws]
    assert max(draw for draw in draws if draw < 0.5) > 0.49
    assert min(draw for draw in draws if draw >= 0.5) < 0.51
