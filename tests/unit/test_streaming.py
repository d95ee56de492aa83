"""Streams of the Hub's layout: the samples of random access, each once, exact on resume."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch

from detrelay.apps.build import build_datasets, train_data
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.places import open_place, open_stream
from detrelay.core.data.readers import hub
from detrelay.core.data.streaming import StreamedImages, StreamedSamples
from detrelay.core.data.writing import write_data
from detrelay.core.engine.batches import StreamBatches
from detrelay.core.engine.logging import read_metrics
from detrelay.core.errors import DataError, RecipeError
from detrelay.core.recipes.recipe import Recipe, override
from factories_data import assert_same_batches, noise_image, write_imagefolder, write_shapes
from processes import in_processes
from tiny_run import final_weights, tiny_run

ROWS, SHARDS = 12, 3
BOXES = [[1.5, 2, 9, 8], [30, 5, 60, 9]]
STATED = """---
dataset_info:
  splits:
  - name: train
    num_bytes: 1
    num_examples: {}
---
"""


@pytest.fixture(autouse=True, scope="module")
def _no_rest() -> Iterator[None]:
    """Let `datasets` not sleep for five seconds after the last row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


def write_rows(path: Path, numbers: range, group: int = 1000) -> None:
    """A parquet file of small images; odd ones have a box that leaves the image."""
    images = []
    for number in numbers:
        file = io.BytesIO()
        noise_image(40 + number, 30, number).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": f"{number}.png"})
    objects = {
        "bbox": datasets.List(datasets.List(datasets.Value("float64"), length=4)),
        "category": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
    }
    features = {"image": datasets.Image(), "image_id": datasets.Value("int64"), "objects": objects}
    columns = {
        "image": images,
        "image_id": [100 + number for number in numbers],
        "objects": [
            {"bbox": BOXES[: 1 + n % 2], "category": [n % 2, 0][: 1 + n % 2]} for n in numbers
        ],
    }
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(str(path), batch_size=group)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of six, four and two rows to train on, and a file of three to evaluate on."""
    folder = tmp_path_factory.mktemp("hub")
    for shard, rows in enumerate((range(6), range(6, 10), range(10, 12))):
        write_rows(folder / "set" / "data" / f"train-{shard:05d}-of-{SHARDS:05d}.parquet", rows)
    (folder / "set" / "README.md").write_text(STATED.format(ROWS))
    write_rows(folder / "val.parquet", range(20, 23))
    return folder / "set"


def settings(place: Path, *more: str) -> list[str]:
    return [
        f"data.train_annotations={place}",
        f"data.val_annotations={place.parent / 'val.parquet'}",
        "data.stream=true",
        "data.stream_buffer=5",
        *more,
    ]


def samples(place: Path, *more: str) -> StreamedSamples:
    recipe = override(Recipe(), settings(place, "data.short_sides=[32,40]", *more))
    images, _ = build_datasets(recipe.data)
    data = train_data(recipe, images, DetrelayImageProcessor())
    assert isinstance(data, StreamedSamples)
    return data


def batches(place: Path, *more: str, workers: int = 0, size: int = 2, **share: Any) -> Any:
    return StreamBatches(
        samples(place, *more),
        size,
        ROWS // size // share.get("num_processes", 1),
        num_workers=workers,
        divisor=32,
        device=torch.device("cpu"),
        **share,
    )


def ids(found: Iterator[Mapping[str, Any]]) -> list[int]:
    return [int(label["image_id"]) for batch in found for label in batch["labels"]]


@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_a_stream_has_the_samples_of_random_access_and_of_the_coco_file(
    layout: str, tmp_path: Path
) -> None:
    write_shapes(tmp_path, (3, 5, 8, 13))
    (part,) = open_place(str(tmp_path / "train.json")).splits.values()
    coco = AnnotatedImages(part)
    folder = tmp_path / "set"
    if layout == "parquet":
        write_data({"train": part}, "parquet", folder)
    else:
        write_imagefolder(folder, coco)
    (part,) = open_place(str(folder)).splits.values()
    at_random = AnnotatedImages(part)
    names = () if layout == "parquet" else [entry.name for entry in coco.categories]
    stream = open_stream(str(folder), names)
    streamed = StreamedImages(stream, rows=len(coco))
    assert streamed.categories == at_random.categories
    if layout == "parquet":
        assert streamed.categories == coco.categories
    rows = list(stream.data)
    assert len(rows) == len(coco) == len(at_random) == 8
    for row, second, third in zip(rows, at_random, coco, strict=True):
        first = streamed.sample(row)
        for other in (second, third):
            assert torch.equal(first.image, other.image)
            assert torch.equal(first.boxes_xyxy, other.boxes_xyxy)
            assert (first.image_id, first.original_size) == (other.image_id, other.original_size)
        assert torch.equal(first.class_labels, second.class_labels)
        assert [streamed.categories[index].name for index in first.class_labels] == [
            coco.categories[index].name for index in third.class_labels
        ]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_comes_once_an_epoch(place: Path, workers: int) -> None:
    found = batches(place, workers=workers)
    first, second = (ids(found.epoch(number)) for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100, 100 + ROWS))
    assert first != second
    assert first != sorted(first)
    assert ids(batches(place, workers=workers).epoch(0)) == first
    assert ids(batches(place, "train.seed=1", workers=workers).epoch(0)) != first


@pytest.mark.parametrize(("workers", "size"), [(0, 2), (2, 2), (2, 1)])
def test_processes_share_the_rows(place: Path, workers: int, size: int) -> None:
    parts = [
        batches(place, workers=workers, size=size, process=process, num_processes=2)
        for process in (0, 1)
    ]
    for epoch in (0, 1):
        found = [ids(part.epoch(epoch)) for part in parts]
        assert [len(part) for part in found] == [6, 6]
        assert sorted(found[0] + found[1]) == list(range(100, 100 + ROWS))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_after_a_resume_are_those_of_a_run_that_never_stopped(
    place: Path, workers: int
) -> None:
    whole = batches(place, workers=workers)
    expected = [list(whole.epoch(number)) for number in range(2)]
    assert {batch["pixel_values"].dtype for batch in expected[0]} == {torch.uint8}
    for skip in (1, 3, 5):  # the rows of one worker end in the fourth batch
        assert_same_batches(
            list(batches(place, workers=workers).epoch(1, skip=skip)), expected[1][skip:]
        )


def test_skipped_images_are_not_decoded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    sample = StreamedImages.sample
    monkeypatch.setattr(
        StreamedImages, "sample", lambda self, row: (seen.append(row), sample(self, row))[1]
    )
    list(batches(place).epoch(0, skip=4))
    assert len(seen) == 4


def test_few_files_are_split_and_workers_without_rows_left_out(tmp_path: Path, place: Path) -> None:
    write_rows(tmp_path / "one.parquet", range(ROWS), group=3)
    more = "data.stream_rows=12"
    assert batches(place, workers=8).num_workers == SHARDS
    found = batches(tmp_path / "one.parquet", f"data.val_annotations={place}", more, workers=8)
    assert found.num_workers == 4
    assert sorted(ids(found.epoch(0))) == list(range(100, 100 + ROWS))


def test_too_high_a_number_of_rows_is_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = batches(place, "data.stream_rows=20")
    found.num_batches = 10
    with caplog.at_level(logging.WARNING):
        taken = ids(found.epoch(0))
        list(found.epoch(1))
    assert len(taken) == 20
    assert set(taken[:ROWS]) == set(range(100, 112))
    (message,) = [record.getMessage() for record in caplog.records if "rows" in record.msg]
    assert "process 1 of 1 found 12 rows, but its share of an epoch is 20" in message
    resumed = batches(place, "data.stream_rows=20")
    resumed.num_batches = 10
    assert ids(resumed.epoch(0, skip=7)) == taken[14:]


def test_categories_may_be_chosen(place: Path) -> None:
    found = batches(place, 'data.categories=["dog"]')
    assert [category.name for category in found.data.images.categories] == ["dog"]
    labels = [label for batch in found.epoch(0) for label in batch["labels"]]
    assert len(labels) == ROWS
    assert {len(label["class_labels"]) for label in labels} == {0, 1}
    with pytest.raises(DataError, match="has no category 'cow'; known are cat, dog"):
        samples(place, 'data.categories=["cow"]')


def test_what_a_stream_cannot_do_is_refused(place: Path) -> None:
    for change in ("data.mosaic=0.5", "data.tile_size=64", "data.batch_by_shape=true"):
        key = change.partition("=")[0]
        with pytest.raises(RecipeError, match=f"in turn, which excludes {key}; leave out one"):
            override(Recipe(), settings(place, change))
    pasted = settings(place, 'data.transforms=[{"name"="paste"}]')
    with pytest.raises(RecipeError, match=r"data\.transforms \(mosaic, mixup, paste\)"):
        override(Recipe(), pasted)
    with pytest.raises(RecipeError, match=r"data\.stream needs data\.train_annotations"):
        override(Recipe(), ["data.stream=true"])


def test_places_that_cannot_be_streamed_are_refused(place: Path, tmp_path: Path) -> None:
    noise_image(9, 9).save(tmp_path / "a.png")
    row = '{"file_name": "a.png", "objects": {"bbox": [[1, 1, 3, 3]], "category": ["cow"]}}'
    (tmp_path / "metadata.jsonl").write_text(row)
    with pytest.raises(DataError, match=r"\(no ClassLabel\); name them all in data\.categories"):
        open_stream(str(tmp_path))
    stream = open_stream(str(tmp_path), ["cat"])
    with pytest.raises(DataError, match=r"does not state its number of rows; set data\.stream_row"):
        StreamedImages(stream)
    with pytest.raises(DataError, match=r"image a\.png: category 'cow' is not in data\.categories"):
        StreamedImages(stream, rows=1).sample(next(iter(stream.data)))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="like Hugging Face datasets, the one format that can be"):
        open_stream(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match="no annotation file or folder"):
        open_stream(str(tmp_path / "nowhere"))
    whole = datasets.load_dataset(str(place.parent / "set"))
    whole.save_to_disk(str(tmp_path / "disk"))
    with pytest.raises(DataError, match=r"mapped into memory as it is.*; set data\.stream=false"):
        open_stream(str(tmp_path / "disk"))


def test_images_of_a_streamed_folder_are_read_from_their_address() -> None:
    with fsspec.open("memory://set/a.png", "wb") as file:
        noise_image(9, 7).save(file, "PNG")
    found = hub._file_of({"path": "memory://set/a.png", "bytes": None}, "set")
    assert isinstance(found, io.BytesIO)
    assert found.read(4) == b"\x89PNG"
    with pytest.raises(DataError, match=r"^set: cannot read memory://set/b\.png"):
        hub._file_of({"path": "memory://set/b.png", "bytes": None}, "set")


@pytest.mark.slow
@pytest.mark.usefixtures("small_and_silent")
def test_a_run_on_a_stream_resumes_exactly(place: Path, tmp_path: Path) -> None:
    chosen = settings(place, "train.batch_size=2", "data.num_workers=2", "train.checkpoint_every=4")
    assert tiny_run(tmp_path / "whole", *chosen) == 0
    assert tiny_run(tmp_path / "halves", *chosen, "train.epochs=1") == 0
    for change in ("data.num_workers=1", "train.batch_size=1 train.accumulation_steps=2"):
        with pytest.raises(RecipeError, match=r"differs from that of the run .*; leave it as it"):
            tiny_run(tmp_path / "halves", *chosen, *change.split(), resume=True)
    assert tiny_run(tmp_path / "halves", *chosen, resume=True) == 0
    expected, found = (final_weights(tmp_path / name) for name in ("whole", "halves"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def train_whole_and_in_halves(folder: Path, chosen: list[str]) -> None:
    assert tiny_run(folder / "whole", *chosen) == 0
    assert tiny_run(folder / "halves", *chosen, "train.epochs=1") == 0
    assert tiny_run(folder / "halves", *chosen, resume=True) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small_and_silent")
def test_two_processes_train_on_a_stream_and_resume_exactly(place: Path, tmp_path: Path) -> None:
    chosen = settings(place, "train.batch_size=2", "data.num_workers=2")
    in_processes(train_whole_and_in_halves, tmp_path, chosen)
    log = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in log if "losses" in row] == [1, 2, 3, 4, 5, 6]
    expected, found = (final_weights(tmp_path / name) for name in ("whole", "halves"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
