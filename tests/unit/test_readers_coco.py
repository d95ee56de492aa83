"""COCO files: everything malformed is rejected in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detrelay.core.data.coco import CocoDataset
from detrelay.core.errors import DataError
from factories_data import coco_content, one_line, write_coco

Content = dict[str, Any]


def drop(part: str, row: int, key: str) -> Callable[[Content], object]:
    return lambda content: content[part][row].pop(key)


def put(part: str, row: int, key: str, value: Any) -> Callable[[Content], object]:
    return lambda content: content[part][row].update({key: value})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content.pop("images"), ["'images'", "missing"]),
        (lambda content: content.pop("annotations"), ["'annotations'", "missing"]),
        (lambda content: content.update(categories={}), ["'categories'", "list", "dict"]),
        (lambda content: content.update(images=[], annotations=[]), ["no images"]),
        (lambda content: content.update(categories=[], annotations=[]), ["no categories"]),
        (lambda content: content["images"].append(3), ["images[3]", "int"]),
        (put("images", 1, "width", "24"), ["images[1].width", "`int", "`str`"]),
        (lambda content: content.update(images=[[]]), ["images[0]", "object", "list"]),
        (put("annotations", 1, "id", [2]), ["annotations[1]", "whole number", "[2]"]),
        (put("annotations", 1, "image_id", [[11]]), ["annotations[1]", "image_id", "[[11]]"]),
        (put("annotations", 1, "category_id", {}), ["annotations[1]", "category_id", "{}"]),
        (put("images", 1, "id", 10**400), ["images[1]", "whole number", "1000", "0..."]),
        (put("annotations", 1, "area", 10**400), ["annotation 2", "area", "at least 0"]),
        (put("annotations", 1, "area", -1), ["annotation 2", "area", "at least 0", "-1"]),
        (put("annotations", 1, "iscrowd", [1]), ["annotation 2", "iscrowd", "[1]"]),
        (put("annotations", 1, "bbox", [0, 0, 1e10, 1]), ["annotation 2", "up to 1e+09"]),
        (put("images", 0, "file_name", "\ud800.png"), ["half a character", "ud800"]),
        (drop("annotations", 2, "bbox"), ["annotations[2]", "'bbox'"]),
        (drop("categories", 0, "name"), ["categories[0]", "'name'"]),
        (put("images", 1, "id", "5"), ["images[1]", "'id'", "whole number", "'5'"]),
        (put("images", 1, "file_name", 5), ["images[1]", "'file_name'", "text"]),
        (put("images", 1, "height", 0), ["image 5", "24 x 0"]),
        (put("images", 1, "id", 11), ["images", "'id'", "more than once: 11"]),
        (put("annotations", 1, "id", 1), ["annotations", "'id'", "more than once: 1"]),
        (put("categories", 1, "id", 90), ["categories", "'id'", "more than once: 90"]),
        (put("categories", 1, "name", "door"), ["categories", "'name'", "'door'"]),
        (put("images", 1, "width", -24), ["image 5", "-24 x 32"]),
        (put("annotations", 1, "image_id", 77), ["annotation 2", "image_id 77"]),
        (put("annotations", 1, "category_id", 4), ["annotation 2", "category_id 4"]),
        (put("annotations", 1, "bbox", [1, 2, 3]), ["annotation 2", "four finite", "[1, 2, 3]"]),
        (put("annotations", 1, "bbox", [1, 2, 3, float("nan")]), ["annotation 2", "nan"]),
        (put("annotations", 1, "bbox", [1, 2, float("inf"), 3]), ["annotation 2", "inf"]),
        (put("annotations", 1, "bbox", [1, 2, "3", 3]), ["annotation 2", "'3'"]),
        (put("annotations", 1, "bbox", [1, 2, 10**400, 3]), ["annotation 2", "four finite"]),
        (put("annotations", 2, "bbox", None), ["annotation 4", "None"]),
        (put("annotations", 1, "iscrowd", 2), ["annotation 2", "iscrowd", "2"]),
        (put("annotations", 1, "area", None), ["annotation 2", "area", "None"]),
    ],
)
def test_malformed_files_are_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Content], object], words: list[str]
) -> None:
    content = coco_content()
    spoil(content)
    path = write_coco(tmp_path, content, images=False)
    with pytest.raises(DataError) as error:
        CocoDataset(path)
    message = one_line(error)
    assert str(path) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [(b"{", "json"), (b"", "json"), (b"\xff\xd8\xff", "json"), (b"[1]", "list"), (b"3", "int")],
)
def test_files_that_are_no_coco_json_are_refused(tmp_path: Path, text: bytes, word: str) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(text)
    with pytest.raises(DataError) as error:
        CocoDataset(path)
    assert str(path) in one_line(error)
    assert word in one_line(error)


@pytest.mark.parametrize(
    "nested", ["[" * 100_000, '{"images":' * 100_000, "[" * 10**5 + "]" * 10**5]
)
@pytest.mark.parametrize("whole", ["%s", '{"images": [], "info": %s}', '{"images": [{"id": %s}]}'])
def test_json_of_any_depth_is_refused_in_one_line(tmp_path: Path, whole: str, nested: str) -> None:
    path = tmp_path / "instances.json"
    path.write_text(whole % nested)
    with pytest.raises(DataError) as error:
        CocoDataset(path)
    assert len(one_line(error)) < 1000


def test_a_list_of_detections_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    row = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    path.write_text(json.dumps([row]))
    with pytest.raises(DataError, match="a list of detections"):
        CocoDataset(path)


def test_unused_numbers_may_be_odd(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1]["score"] = float("nan")
    content["info"] = {"year": 10**400}
    assert CocoDataset(write_coco(tmp_path, content)).report.boxes == 3


def test_sizes_that_the_json_does_not_give_come_from_the_files(tmp_path: Path) -> None:
    content = coco_content()
    path = write_coco(tmp_path, content)
    del content["images"][1]["width"], content["images"][2]["height"]
    path.write_text(json.dumps(content))
    data = CocoDataset(path)
    assert data.sizes.tolist() == [[30, 40], [32, 24], [20, 20]]
    assert "the size of 2 images is taken from their files" in data.report.summary()
    (tmp_path / "images" / "b.png").write_text("no image")
    with pytest.raises(DataError, match=r"b\.png is not an image in a known format"):
        CocoDataset(path)


def test_missing_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file .*nothing\.json"):
        CocoDataset(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="cannot read"):
        CocoDataset(tmp_path)


def test_names_may_be_in_any_script_and_the_file_may_start_with_a_mark(tmp_path: Path) -> None:
    content = coco_content()
    content["categories"][0]["name"] = "дверь"
    path = write_coco(tmp_path, content)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8-sig")
    assert CocoDataset(path).categories[1].name == "дверь"
