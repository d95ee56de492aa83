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
from detrelay.core.data.coco import CocoDataset
from detrelay.core.data.collate import EncodedSample
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import DetectionDataset, Order, ShapeBatches, VisitSampler
from detrelay.core.errors import DataError
from detrelay.core.recipes.recipe import DataConfig
from factories_data import write_coco


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
                mosaic=mosaic,
            )
        ),
        DetrelayImageProcessor(),
        seed=seed,
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
    ratios = [1.0 if one else 0.99 for one in wide]
    grouped = VisitSampler(50, seed=3, order=Order(ratios, aspect_group=4))
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


def test_groups_by_shape_hold_neighbours_and_leave_out_others_each_epoch() -> None:
    ratios = [0.5 + 0.01 * ((37 * index) % 150) for index in range(150)]  # 50 high, 100 wide
    sampler = VisitSampler(150, seed=3, order=Order(ratios, shape_group=4))
    orders, last = [], []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = [visit - 150 * epoch for visit in sampler]
        assert sorted(order) == list(range(150))
        groups = [
            [ratios[index] for index in order[start : start + 4]] for start in range(0, 148, 4)
        ]
        assert max(max(group) - min(group) for group in groups) < 0.2
        assert all(max(group) < 1 or min(group) >= 1 for group in groups)
        orders.append(order)
        last.append(set(order[-2:]))
    assert orders[0] != orders[1] != orders[2]
    assert last[0] != last[1] or last[1] != last[2]
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]


def test_data_knows_the_order_of_its_visits() -> None:
    data = DetectionDataset(
        ShapesDataset(6, image_size=64),
        build_train_transform(DataConfig()),
        DetrelayImageProcessor(),
        seed=5,
        order=Order([1.5, 0.5] * 3, aspect_group=2),
    )
    order = list(data.sampler())
    assert order == list(VisitSampler(6, seed=5, order=data.order))
    assert order[0] % 2 == order[1] % 2


def test_strong_augmentation_stops_and_repeats_by_visit() -> None:
    samples = ShapesDataset(6, image_size=48, seed=1)
    plain = DataConfig(short_sides=(32,), max_size=64, flip_probability=0)
    strong = dataclasses.replace(
        plain, transforms=({"name": "photometric_distort", "probability": 1.0}, {"name": "resize"})
    )

    def data(**options: Any) -> DetectionDataset:
        config = dataclasses.replace(strong, **options)
        transform = build_train_transform(config)
        return DetectionDataset(samples, transform, DetrelayImageProcessor(), seed=4)

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
