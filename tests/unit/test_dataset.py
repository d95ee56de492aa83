"""The images of a dataset, with their ids."""

from __future__ import annotations

from pathlib import Path

from detrelay.apps.sources.dataset import open_dataset
from detrelay.apps.sources.item import Input
from factories_data import write_coco


def test_images_of_a_dataset_bring_their_ids(tmp_path: Path) -> None:
    source = open_dataset(write_coco(tmp_path), None, allow_outside=False)
    listed: list[Input] = list(source.inputs)
    assert [(item.file_name, item.image_id) for item in listed] == [
        *(("a.png", 11), ("b.png", 5), ("c.png", 8)),
    ]
    assert [tuple(item.read(10_000).shape) for item in listed] == [
        *((3, 30, 40), (3, 32, 24), (3, 20, 20)),
    ]
