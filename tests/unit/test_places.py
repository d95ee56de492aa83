"""How places are read: splits, held-out shares, places without annotations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from detrelay.core.data.places import FORMATS, cut, evaluation_split, open_place, train_and_val
from detrelay.core.errors import DataError
from factories_formats import write_format


def voc_files(folder: Path, **names: str) -> Path:
    """A picture and an XML file for each stem; the words are the categories of its boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (stem, labels) in enumerate(names.items()):
        Image.new("RGB", (64, 48), (90, 120, 60)).save(folder / f"{stem}.jpg")
        objects = "".join(
            f"<object><name>{label}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax>"
            f"<ymax>{number + 6}</ymax></bndbox></object>"
            for label in labels.split()
        )
        (folder / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    return folder


NOTHING: list[tuple[str, Callable[[Path], object], str]] = [
    ("nowhere", lambda place: None, "no annotation file or folder"),
    ("empty", lambda place: place.mkdir(), "no annotations in a known format"),
    ("a.txt", lambda place: place.touch(), "no annotations in a known format"),
    ("a.json", os.mkfifo, "no annotations in a known format"),
    ("vok:nowhere", lambda place: None, "unknown format vok; did you mean voc?"),
    ("x" * 300, lambda place: None, "no annotation file or folder"),
    ("a\0b", lambda place: None, "no annotation file or folder"),
]


@pytest.mark.parametrize(("name", "make", "message"), NOTHING)
def test_places_without_annotations(
    name: str, make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    place = name if ":" in name else str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        open_place(place)


@pytest.mark.parametrize("name", FORMATS)
def test_a_place_of_another_format_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(DataError, match="does not look like"):
            open_place(f"{name}:{place}")


@pytest.mark.parametrize("name", ["coco", "voc", "labelme", "csv_tensorflow", "cvat", "yolo_v5"])
def test_pipes_in_the_place_of_files_are_refused(name: str, tmp_path: Path) -> None:
    place, _ = write_format(name, tmp_path)
    files = [
        file
        for file in sorted(tmp_path.rglob("*"))
        if file.suffix in (".json", ".xml", ".txt", ".csv", ".yaml") and file.is_file()
    ]
    for file in (files[0], files[-1]):
        whole = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with contextlib.suppress(DataError):  # what matters is that it returns
            open_place(place)
        file.unlink()
        file.write_bytes(whole)


def test_a_share_is_cut_where_nothing_is_held_out(tmp_path: Path) -> None:
    voc_files(tmp_path, **{f"_{number}": "cat" for number in range(10)})
    place = (str(tmp_path), None)
    train, val = train_and_val(place, (None, None), share=0.3, seed=4)
    assert (len(train), len(val)) == (7, 3)
    assert not set(train.image_ids.tolist()) & set(val.image_ids.tolist())
    names = {train.images.name(row) for row in range(7)} | {
        val.images.name(row) for row in range(3)
    }
    assert len(names) == 10
    for part in (train, val):  # boxes stay with their images
        for image in range(len(part)):
            (box,) = part.boxes_xywh[part.box_image == image]
            assert part.images.name(image) == f"_{int(box[3]) - 5}.jpg"
    assert "3 of 10 images are held out (seed 4)" in val.notes[-1]
    assert "Pascal VOC, 10 images (all 10), 10 boxes, 1 categories" in train.notes[-1]
    again, _ = train_and_val(place, (None, None), share=0.3, seed=4)
    other, _ = train_and_val(place, (None, None), share=0.3, seed=5)
    assert again.image_ids.tolist() == train.image_ids.tolist() != other.image_ids.tolist()
    with pytest.raises(DataError, match="one image cannot be cut"):
        cut(train.select(train.image_ids == train.image_ids[0]), 0.5, 0)


def test_splits_may_lie_apart_and_names_need_not_all_occur(tmp_path: Path) -> None:
    voc_files(tmp_path / "a", one="dog cat")
    voc_files(tmp_path / "b", two="dog")
    places = (str(tmp_path / "a"), None), (str(tmp_path / "b"), None)
    train, val = train_and_val(*places, share=0.1, seed=0)
    assert val.categories == train.categories
    assert [category.name for category in train.categories] == ["cat", "dog"]
    assert val.box_class.tolist() == [1]
    with pytest.raises(DataError, match="must be among those of"):
        train_and_val(*places[::-1], share=0.1, seed=0)


def test_a_place_without_the_split_is_refused(tmp_path: Path) -> None:
    place, _ = write_format("coco", tmp_path)
    (tmp_path / "annotations" / "instances_val.json").rename(
        tmp_path / "annotations" / "instances_test.json"
    )
    assert len(evaluation_split(place)) == 1  # the test images stand in
    cvat, _ = write_format("cvat", tmp_path / "cvat")
    file = tmp_path / "cvat" / "annotations.xml"
    file.write_text(file.read_text().replace('subset="val"', 'subset="later"'))
    with pytest.raises(DataError, match="has no split 'val', only train, all; name the files"):
        evaluation_split(cvat)
