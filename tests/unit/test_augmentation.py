"""Transforms by name: the list means what the settings mean, and takes one's own."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.augmentation import Crop, build_eval_transform, build_train_transform
from detrelay.core.data.coco import Sample
from detrelay.core.data.geometry import on_both, random_crop, resize, scale, turn_left
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import DataConfig, Recipe, override
from factories_data import assert_boxes_lie_on_bright_pixels, make_sample, marked_sample

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
        ({"transforms": ({"name": "mosaic"},)}, "'mosaic': .*missing.* argument: 'probability'"),
        (
            {"transforms": ({"name": "mixup", "probability": 2},)},
            "transform 'mixup': probability must lie between 0 and 1, found 2",
        ),
        (
            {"transforms": ({"name": "mosaic", "probability": 1, "tile": 3},)},
            "transform 'mosaic': tile must be at least 8 pixels, found 3",
        ),
        (
            {"transforms": ({"name": "flip", "epochs": -1},)},
            "transform 'flip': epochs must be a number from 0, found -1",
        ),
        (
            {"multi_scale_by_step": True},
            "draws a size for each step, but there is only one; list several in data.short_sides",
        ),
        (
            {"multi_scale_epochs": 2, "transforms": ({"name": "flip"},)},
            "has neither 'resize' nor 'scale_jitter'",
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
    transform = build_train_transform(replace(config, strong_epochs=2))
    sample = make_sample()
    expected = [resize(sample, 30, config.max_size)]
    assert_same([transform(sample, 2)], expected)
    torch.manual_seed(0)
    strong = transform(sample, 1)
    torch.manual_seed(0)
    assert_same([build_train_transform(config)(sample, 9)], [strong])
    assert strong.image.shape != expected[0].image.shape


JOINING = (
    {"name": "mosaic", "probability": 0.7, "tile": 40},
    {"name": "mixup", "probability": 0.6},
)


def joined(config: DataConfig, epoch: int = 0) -> list[Sample]:
    """Images of several seeds, with another one for mosaics and mixtures."""
    transform = pickle.loads(pickle.dumps(build_train_transform(config)))
    results = []
    for seed in range(12):
        torch.manual_seed(seed)
        results.append(transform(make_sample(60, 80), epoch, marked_sample))
    return results


def test_mosaic_and_mixup_are_transforms_of_the_list() -> None:
    usual = ({"name": "flip"}, {"name": "resize"})
    beside = DataConfig(short_sides=(40,), mosaic=0.7, mixup=0.6, strong_epochs=3)
    within = replace(beside, mosaic=0.0, mixup=0.0, transforms=(*JOINING, *usual))
    names_only = replace(beside, transforms=({"name": "mosaic"}, {"name": "mixup"}, *usual))
    expected = joined(beside)
    assert max(len(sample.boxes_xyxy) for sample in expected) > 4
    for config in (within, names_only, replace(beside, transforms=usual)):
        assert_same(joined(config), expected)
    plain = replace(beside, mosaic=0.0, mixup=0.0)
    assert_same(joined(beside, epoch=3), joined(plain))
    ends = ({**JOINING[0], "epochs": 1}, {**JOINING[1], "epochs": 2}, *usual)
    listed = replace(within, transforms=ends)
    assert_same(joined(listed, epoch=0), expected)
    assert_same(joined(listed, epoch=1), joined(replace(plain, mixup=0.6)))
    assert_same(joined(listed, epoch=2), joined(plain))


def test_images_have_the_size_of_evaluation_after_the_multi_scale_epochs() -> None:
    sizes = {"eval_short_side": 50, "eval_max_size": 60, "flip_probability": 0.0}
    for changes in ({"short_sides": (32, 40)}, {"jitter_size": 64}):
        config = DataConfig(**sizes, **changes, multi_scale_epochs=4)
        transform = build_train_transform(config)
        early = {tuple(transform(make_sample(60, 80), 3).image.shape[1:]) for _ in range(9)}
        assert len(early) > 1
        assert (45, 60) not in early
        assert transform(make_sample(60, 80), 4).image.shape[1:] == (45, 60)


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


def test_eval_transform_scales_boxes_with_the_image() -> None:
    sample = make_sample(60, 80)
    resized = build_eval_transform(90, 1000)(sample)
    assert resized.image.shape == (3, 90, 120)
    assert resized.image.dtype == torch.uint8
    torch.testing.assert_close(resized.boxes_xyxy, sample.boxes_xyxy * 1.5)
    assert type(resized.boxes_xyxy) is torch.Tensor
    assert type(resized.image) is torch.Tensor
    assert resized.original_size == (60, 80)
    assert resized.class_labels.tolist() == [0, 1]


def test_flip_mirrors_image_and_boxes() -> None:
    sample = make_sample(60, 80)
    flip = build_train_transform(DataConfig(flip_probability=1, short_sides=(60,)))
    flipped = flip(sample)
    assert torch.equal(flipped.image, sample.image.flip(-1))
    assert flipped.boxes_xyxy.tolist() == [[50, 20, 70, 50], [1, 5, 40, 45]]
    never = build_train_transform(DataConfig(flip_probability=0, short_sides=(60,)))
    assert torch.equal(never(sample).image, sample.image)


def test_vertical_flip_turns_image_and_boxes_upside_down() -> None:
    sample = make_sample(60, 80)
    for chance, upside_down in ((1, True), (0, False)):
        entries = ({"name": "vertical_flip", "probability": chance},)
        found = build_train_transform(DataConfig(transforms=entries))(sample)
        assert torch.equal(found.image, sample.image.flip(-2) if upside_down else sample.image)
        left, top, right, bottom = sample.boxes_xyxy.unbind(-1)
        turned = torch.stack([left, 60 - bottom, right, 60 - top], -1)
        assert torch.equal(found.boxes_xyxy, turned if upside_down else sample.boxes_xyxy)
    with pytest.raises(RecipeError, match=r"vertical_flip.*between 0 and 1, found 2"):
        build_train_transform(DataConfig(transforms=({"name": "vertical_flip", "probability": 2},)))


@pytest.mark.parametrize("times", [1, 3])
def test_a_turn_takes_the_boxes_along(times: int) -> None:
    sample = make_sample(60, 80, [[10, 20, 30, 50]])
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[:, 20:50, 10:30] = 1
    turned = turn_left(replace(sample, image=image), times)
    assert turned.image.shape == (3, 80, 60)
    (box,) = turned.boxes_xyxy.int().tolist()
    assert box == ([20, 50, 50, 70] if times == 1 else [10, 10, 40, 30])
    inside = turned.image[:, box[1] : box[3], box[0] : box[2]]
    assert (inside == 1).all()
    assert inside.sum() == image.sum()


def test_half_of_the_quarter_turns_go_left() -> None:
    entries = ({"name": "quarter_turn", "probability": 0.5}, {"name": "resize"})
    turn = build_train_transform(DataConfig(transforms=entries, short_sides=(60,)))
    sample = make_sample(60, 80)
    ways = Counter[int]()
    torch.manual_seed(0)
    for _ in range(200):
        found = turn(sample).image
        ways[next(k for k in (0, 1, 3) if torch.equal(found, sample.image.rot90(k, (1, 2))))] += 1
    assert 80 < ways[0] < 120
    assert 35 < ways[1] < 65


CROP = DataConfig(
    short_sides=(80, 96, 120),
    max_size=200,
    crop=True,
    crop_short_sides=(90, 110),
    crop_range=(40, 80),
)


def test_boxes_follow_the_pixels_through_crops() -> None:
    transform = build_train_transform(CROP)
    torch.manual_seed(0)
    fewer = 0
    for _ in range(60):
        result = transform(marked_sample())
        # a pixel of slack along the edges of two boxes
        assert_boxes_lie_on_bright_pixels(result, 4 * sum(result.image.shape[-2:]))
        sizes = result.boxes_xyxy[:, 2:] - result.boxes_xyxy[:, :2]
        assert (sizes > 0).all()
        assert len(result.class_labels) == len(result.boxes_xyxy)
        fewer += len(result.class_labels) < 2
    assert 0 < fewer < 60


def test_large_scale_jitter_scales_into_the_square_and_cuts() -> None:
    config = DataConfig(jitter_size=100, jitter_range=(0.5, 2.0))
    transform = build_train_transform(config)
    torch.manual_seed(0)
    longest = []
    for _ in range(30):
        result = transform(marked_sample())  # 100 x 140 pixels
        height, width = result.image.shape[-2:]
        assert (height <= 100, width <= 100) == (True, True)
        assert width >= 50
        if width < 100:  # nothing was cut
            assert height == pytest.approx(width * 100 / 140, abs=1)
        assert_boxes_lie_on_bright_pixels(result, 4 * (height + width))
        longest.append(width)
    assert longest.count(100) in range(12, 28)  # scales from 1 to 2 fill the square
    assert len(set(longest)) > 10
    fixed = DataConfig(flip_probability=0, jitter_size=70, jitter_range=(1, 1))
    assert build_train_transform(fixed)(marked_sample()).image.shape == (3, 50, 70)


def test_crop_sizes_stay_in_range_and_in_the_image() -> None:
    shapes = set()
    config = DataConfig(
        short_sides=(80,), max_size=1000, crop=True, crop_short_sides=(60,), crop_range=(50, 90)
    )
    torch.manual_seed(0)
    for _ in range(200):
        height, width = build_train_transform(config)(make_sample(60, 60)).image.shape[-2:]
        assert min(height, width) == 80
        shapes.add((height, width))
    # windows of 50 to 60 pixels: the aspect lies within 6 / 5, the long side within 96
    assert len(shapes) > 10
    assert max(map(max, shapes)) in range(90, 97)


def test_crop_of_an_image_below_the_range_keeps_it() -> None:
    config = DataConfig(
        flip_probability=0,
        short_sides=(60,),
        crop=True,
        crop_short_sides=(60,),
        crop_range=(100, 200),
    )
    sample = make_sample(60, 80)
    torch.manual_seed(0)
    for _ in range(10):  # half of them crop
        assert torch.equal(build_train_transform(config)(sample).image, sample.image)


def test_color_jitter_changes_colours_only() -> None:
    sample = make_sample(60, 80)
    jitter = build_train_transform(
        DataConfig(flip_probability=0, short_sides=(60,), color_jitter=0.4)
    )
    changed = jitter(sample)
    assert not torch.equal(changed.image, sample.image)
    assert changed.image.dtype == torch.uint8
    assert torch.equal(changed.boxes_xyxy, sample.boxes_xyxy)


def test_short_sides_are_all_drawn() -> None:
    transform = build_train_transform(DataConfig(short_sides=(48, 60, 72)))
    torch.manual_seed(0)
    drawn = {transform(make_sample(60, 80)).image.shape[-2] for _ in range(40)}
    assert drawn == {48, 60, 72}


def test_images_without_boxes_pass() -> None:
    torch.manual_seed(0)
    for _ in range(10):
        result = build_train_transform(CROP)(make_sample(60, 80, []))
        assert result.boxes_xyxy.shape == (0, 4)
        assert result.class_labels.shape == (0,)


def test_the_input_is_left_alone() -> None:
    sample, same = marked_sample(), marked_sample()
    for _ in range(5):
        build_train_transform(CROP)(sample)
    assert torch.equal(sample.image, same.image)
    assert torch.equal(sample.boxes_xyxy, same.boxes_xyxy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("flip_probability", 1.5),
        ("color_jitter", -0.1),
        ("short_sides", ()),
        ("crop_short_sides", (0,)),
        ("crop_short_sides", 5),
        ("max_size", 10),
        ("crop_range", (60, 50)),
        ("mosaic", 1.5),
        ("jitter_size", -1),
        ("jitter_range", (0, 1)),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=name):
        build_train_transform(DataConfig(**{name: value}))
