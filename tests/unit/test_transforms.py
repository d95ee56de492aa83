"""Augmentation of image and boxes together, and visits."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from detrelay.core.data.augmentation import build_eval_transform, build_train_transform
from detrelay.core.data.coco import CocoDataset, Sample
from detrelay.core.data.collate import EncodedSample
from detrelay.core.data.geometry import make_mosaic, mix, resized_shape
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import DetectionDataset, VisitSampler
from detrelay.core.errors import DataError, RecipeError
from detrelay.core.recipes.recipe import DataConfig
from factories_data import make_sample, write_coco


@pytest.mark.parametrize(
    ("size", "short_side", "max_size", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut
        ((640, 480), 800, 1333, (1066, 800)),
        ((500, 500), 800, 1333, (800, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),  # round(399.9), then cut
        ((427, 1001), 800, 1333, (569, 1333)),  # round(568.6), 1333.88 is cut
        ((480, 640), 480, 1333, (480, 640)),
        ((480, 640), 800, None, (800, 1066)),
        ((1, 1000), 800, 100, (1, 100)),  # a sliver loses its aspect
        ((3000, 1), 800, 1333, (1333, 1)),
        ((1, 90), 1, 100, (1, 90)),
    ],
)
def test_resize_rule(
    size: tuple[int, int], short_side: int, max_size: int | None, expected: tuple[int, int]
) -> None:
    assert resized_shape(*size, short_side, max_size) == expected


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


def marked_sample() -> Sample:
    """A black image with two bright boxes, so that pixels tell where boxes are."""
    sample = make_sample(100, 140, [[20, 30, 60, 80], [90, 10, 130, 50]])
    image = torch.zeros_like(sample.image)
    for left, top, right, bottom in sample.boxes_xyxy.int().tolist():
        image[:, top:bottom, left:right] = 255
    return Sample(image, sample.boxes_xyxy, sample.class_labels, 7, (100, 140))


CROP = DataConfig(
    short_sides=(80, 96, 120),
    max_size=200,
    crop=True,
    crop_short_sides=(90, 110),
    crop_range=(40, 80),
)


def assert_boxes_lie_on_bright_pixels(result: Sample, slack: int) -> None:
    height, width = result.image.shape[-2:]
    expected = torch.zeros(height, width)
    for left, top, right, bottom in result.boxes_xyxy.round().int().tolist():
        assert 0 <= left <= right <= width
        assert 0 <= top <= bottom <= height
        expected[top:bottom, left:right] = 1
    bright = (result.image[0] > 127).float()
    assert (bright - expected).abs().sum() <= slack


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


def test_mosaic_joins_four_images_with_their_boxes() -> None:
    torch.manual_seed(0)
    sides = set()
    for _ in range(12):
        result = make_mosaic([marked_sample() for _ in range(4)], 70)  # each becomes 50 x 70
        assert result.image.shape == (3, 140, 140)
        assert result.image.dtype == torch.uint8
        assert_boxes_lie_on_bright_pixels(result, 8 * 140)
        assert len(result.class_labels) == len(result.boxes_xyxy) <= 8
        assert ((result.boxes_xyxy[:, 2:] - result.boxes_xyxy[:, :2]) > 0).all()
        sides.add(int((result.image == 114).all(0).sum()))
    assert len(sides) > 5  # the meeting point moves
    assert (result.image_id, result.original_size) == (7, (100, 140))


def test_images_of_a_mosaic_meet_in_the_order_given() -> None:
    samples = [make_sample(40, 40, [[0.0, 0.0, 40.0, 40.0]]) for _ in range(4)]
    for shade, sample in enumerate(samples):
        sample.image.fill_(10 * shade)
        sample.class_labels.fill_(shade)
    torch.manual_seed(3)
    result = make_mosaic(samples, 40)
    assert result.class_labels.tolist() == [0, 1, 2, 3]
    for shade, (left, top, right, bottom) in enumerate(result.boxes_xyxy.int().tolist()):
        assert (result.image[:, top:bottom, left:right] == 10 * shade).all()
    corners = result.boxes_xyxy
    meeting = corners[0, 2:]
    assert torch.equal(corners[3, :2], meeting)
    assert torch.equal(corners[1, [0, 3]], meeting)
    assert torch.equal(corners[2, [2, 1]], meeting)


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


def make_visits(seed: int = 0, num_images: int = 4, mosaic: float = 0.0) -> DetectionDataset:
    return DetectionDataset(
        ShapesDataset(num_images, image_size=64),
        build_train_transform(
            DataConfig(
                short_sides=(48, 56, 64),
                max_size=96,
                crop=True,
                crop_short_sides=(48, 64),
                crop_range=(32, 48),
                color_jitter=0.2,
            )
        ),
        DetrelayImageProcessor(),
        seed=seed,
        mosaic=mosaic,
        mosaic_tile=40,
    )


def test_a_visit_names_image_and_time() -> None:
    data = make_visits()
    assert len(data) == 4
    assert [int(data[visit]["labels"]["image_id"]) for visit in range(9)] == [
        *[1, 2, 3, 4],
        *[1, 2, 3, 4],
        1,
    ]
    other_times = [data[2 + 4 * epoch]["pixel_values"] for epoch in range(4)]
    assert len({(*image.shape, float(image.sum())) for image in other_times}) == 4


def test_a_visit_follows_from_seed_and_number_alone() -> None:
    wanted = make_visits()[6]
    torch.manual_seed(99)
    data = make_visits()
    for visit in (3, 1, 2**40, 6):
        found = data[visit]
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])
    assert torch.equal(found["labels"]["boxes"], wanted["labels"]["boxes"])
    other = make_visits(seed=1)[6]["pixel_values"]
    assert other.shape != wanted["pixel_values"].shape or not torch.equal(
        other, wanted["pixel_values"]
    )


def test_visits_leave_the_global_generator_alone() -> None:
    data = make_visits()
    before = torch.get_rng_state()
    data[5]
    assert torch.equal(torch.get_rng_state(), before)


def test_visits_can_be_sent_to_workers_that_start_afresh() -> None:
    data = make_visits()
    sent = pickle.loads(pickle.dumps(data))
    assert torch.equal(sent[5]["pixel_values"], data[5]["pixel_values"])
    pickle.dumps(build_eval_transform(48, 96))


@pytest.mark.parametrize("mosaic", [0.0, 0.5])
def test_workers_make_no_difference(mosaic: float) -> None:
    data = make_visits(mosaic=mosaic)
    order = [5, 2, 7, 0]
    loader = DataLoader(data, batch_size=None, sampler=order, num_workers=2)
    for visit, loaded in zip(order, loader, strict=True):
        assert torch.equal(loaded["pixel_values"], data[visit]["pixel_values"])


def test_mosaics_come_with_their_chance() -> None:
    plain, some, always = (make_visits(mosaic=chance) for chance in (0.0, 0.5, 1.0))
    counts = [
        [len(data[visit]["labels"]["boxes"]) for visit in range(12)]
        for data in (plain, some, always)
    ]
    assert max(counts[0]) <= 4
    assert sum(counts[0]) < sum(counts[1]) < sum(counts[2])
    assert torch.equal(some[3]["pixel_values"], make_visits(mosaic=0.5)[3]["pixel_values"])


def broken_visits(folder: Path, names: list[str], *, skip: bool) -> DetectionDataset:
    """Visits of images with ids 11, 5 and 8, some of which are damaged."""
    path = write_coco(folder)
    for name in names:
        (folder / "images" / name).write_bytes(b"no image")
    transform = build_train_transform(DataConfig(short_sides=(32,)))
    return DetectionDataset(
        CocoDataset(path), transform, DetrelayImageProcessor(), seed=0, skip_broken=skip
    )


def test_a_broken_image_stops_unless_it_is_to_be_skipped(tmp_path: Path) -> None:
    data = broken_visits(tmp_path, ["b.png"], skip=False)
    with pytest.raises(DataError, match=r"b\.png is not an image"):
        data[1]


def test_a_broken_image_is_reported_once_and_the_next_takes_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = broken_visits(tmp_path, ["b.png", "c.png"], skip=True)
    found = [int(data[visit]["labels"]["image_id"]) for visit in range(6)]
    assert found == [11] * 6
    reports = [record.getMessage() for record in caplog.records]
    assert len(reports) == 2
    for name, report in zip(("b.png", "c.png"), reports, strict=True):
        assert report.startswith("skipped, the next image takes its place: ")
        assert str(tmp_path / "images" / name) in report


def test_workers_survive_a_broken_image_and_report_it_once(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    handler = logging.FileHandler(tmp_path / "log")  # workers have no other way to this test
    log = logging.getLogger("detrelay.core.data.transforms")
    log.addHandler(handler)
    request.addfinalizer(lambda: (log.removeHandler(handler), handler.close()))
    data = broken_visits(tmp_path, ["b.png"], skip=True)
    loader = DataLoader(
        data, batch_size=None, sampler=list(range(9)), num_workers=2, persistent_workers=True
    )
    for _ in range(2):
        assert [int(item["labels"]["image_id"]) for item in loader] == [11, 8, 8] * 3
    assert (tmp_path / "log").read_text().count("b.png is not an image") == 1


def test_nothing_but_broken_images_is_refused(tmp_path: Path) -> None:
    data = broken_visits(tmp_path, ["a.png", "b.png", "c.png"], skip=True)
    with pytest.raises(DataError, match=r"none of 3 images can be read; the last one: .*c\.png"):
        data[0]


def test_sampler_visits_each_image_once_an_epoch() -> None:
    sampler = VisitSampler(50, seed=3)
    assert len(sampler) == 50
    sampler.set_epoch(2)
    second = list(sampler)
    assert sorted(second) == list(range(100, 150))
    assert list(sampler) == second
    sampler.set_epoch(3)
    third = [visit % 50 for visit in sampler]
    assert third != [visit % 50 for visit in second]
    other = VisitSampler(50, seed=4)
    other.set_epoch(2)
    assert list(other) != second
    torch.manual_seed(5)
    again = VisitSampler(50, seed=3)
    again.set_epoch(2)
    assert list(again) == second


def test_sampler_without_shuffling_keeps_the_order() -> None:
    sampler = VisitSampler(3, seed=0, shuffle=False)
    assert list(sampler) == [0, 1, 2]
    sampler.set_epoch(1)
    assert list(sampler) == [3, 4, 5]


def test_groups_share_their_aspect_and_each_image_comes_once() -> None:
    wide = [index % 3 > 0 for index in range(50)]  # 33 wide, 17 high
    plain = VisitSampler(50, seed=3)
    grouped = VisitSampler(50, seed=3, wide=wide, aspect_group=4)
    orders = []
    for epoch in range(3):
        plain.set_epoch(epoch)
        grouped.set_epoch(epoch)
        order = [visit - 50 * epoch for visit in grouped]
        assert sorted(order) == list(range(50))
        kinds = [{wide[index] for index in order[start : start + 4]} for start in range(0, 48, 4)]
        assert Counter(map(len, kinds)) == {1: 12}  # 8 groups of wide ones, 4 of high ones
        assert list(plain) != list(grouped)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    grouped.set_epoch(0)
    assert list(grouped) == orders[0]


def test_data_knows_the_order_of_its_visits() -> None:
    data = DetectionDataset(
        ShapesDataset(6, image_size=64),
        build_train_transform(DataConfig()),
        DetrelayImageProcessor(),
        seed=5,
        wide=[True, False] * 3,
        aspect_group=2,
    )
    order = list(data.sampler())
    assert order == list(VisitSampler(6, seed=5, wide=[True, False] * 3, aspect_group=2))
    assert order[0] % 2 == order[1] % 2


def test_a_mixture_holds_both_images_and_all_boxes() -> None:
    first, second = make_sample(60, 80, seed=1), make_sample(90, 50, seed=2)
    torch.manual_seed(3)
    mixed = mix(first, second)
    assert mixed.image.shape == (3, 90, 80)
    assert torch.equal(mixed.boxes_xyxy, torch.cat([first.boxes_xyxy, second.boxes_xyxy]))
    assert mixed.class_labels.tolist() == [0, 1, 0, 1]
    # where only one of them is, its share can be read off; the shares sum to one
    alone = (mixed.image[:, :60, 50:].float() / first.image[:, :60, 50:].clamp(min=1)).median()
    other = (mixed.image[:, 60:, :50].float() / second.image[:, 60:].clamp(min=1)).median()
    assert 0 < alone < 1
    assert float(alone + other) == pytest.approx(1, abs=0.03)
    both = alone * first.image[:, :60, :50] + other * second.image[:, :60, :50]
    assert (mixed.image[:, :60, :50] - both).abs().max() < 4


def test_strong_augmentation_stops_and_repeats_by_visit() -> None:
    samples = ShapesDataset(6, image_size=48, seed=1)
    plain = DataConfig(short_sides=(32,), max_size=64, flip_probability=0)
    strong = dataclasses.replace(
        plain, transforms=({"name": "photometric_distort", "probability": 1.0}, {"name": "resize"})
    )

    def data(**options: Any) -> DetectionDataset:
        return DetectionDataset(
            samples,
            build_train_transform(strong),
            DetrelayImageProcessor(),
            seed=4,
            late_transform=build_train_transform(strong, strong=False),
            **options,
        )

    late = data(strong_epochs=2, mosaic=1.0, mixup=1.0)
    never = data(mosaic=1.0, mixup=1.0)
    quiet = DetectionDataset(
        samples, build_train_transform(plain), DetrelayImageProcessor(), seed=4
    )
    for visit in (0, 6, 11):  # epochs 0 and 1
        assert torch.equal(late[visit]["pixel_values"], never[visit]["pixel_values"])
        assert torch.equal(late[visit]["pixel_values"], late[visit]["pixel_values"])
        assert not same_pixels(late[visit], quiet[visit])
    for visit in (12, 17, 30):
        assert same_pixels(late[visit], quiet[visit])
        assert not same_pixels(never[visit], quiet[visit])
    assert not same_pixels(data(mosaic=1.0)[3], data(mosaic=1.0, mixup=1.0)[3])


def same_pixels(first: EncodedSample, second: EncodedSample) -> bool:
    return torch.equal(first["pixel_values"], second["pixel_values"])
