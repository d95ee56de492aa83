"""Shared by the readers: rows into columns, splits, numbers, and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.readers.table import (
    Table,
    finish,
    image_files,
    read_json,
    read_json_list,
    read_text,
    read_xml,
    split_folders,
    split_name,
    to_number,
)
from detrelay.core.data.sample import Category
from detrelay.core.errors import DataError


def table(folder: Path, *rows: tuple[str, str]) -> Table:
    """An image of 20 x 10 pixels with a box of 4 x 3 for each row (file name, label)."""
    made = Table(folder / "boxes.txt", folder)
    for name, label in rows:
        image, height, width = made.image(folder / name, (10, 20))
        assert (height, width) == (10, 20)
        made.box(image, label, (1, 2), (5, 5))
    return made


def test_rows_become_columns_with_names_in_alphabetical_order(tmp_path: Path) -> None:
    train = table(tmp_path, ("a.png", "dog"), ("sub/b.png", "cat"), ("a.png", "cat"))
    train.crowd()
    train.area(7.5)
    train.note("rows given twice left out", 2)
    splits = finish({"train": train, "val": table(tmp_path, ("c.png", "dog"))})
    part = splits["train"]
    assert part.categories == (Category(1, "cat"), Category(2, "dog"))
    assert [part.images.name(row) for row in range(2)] == ["a.png", "sub/b.png"]
    assert part.boxes_xywh.tolist() == [[1, 2, 4, 3]] * 3
    assert part.areas.tolist() == [12, 12, 7.5]
    assert part.crowd.tolist() == [False, False, True]
    assert (part.box_image.tolist(), part.box_class.tolist()) == ([0, 1, 0], [1, 0, 0])
    assert part.notes == ("2 rows given twice left out",)
    assert not part.own_ids
    # ids are unique over all splits
    assert part.image_ids.tolist() + splits["val"].image_ids.tolist() == [1, 2, 3]
    assert part.box_ids.tolist() + splits["val"].box_ids.tolist() == [1, 2, 3, 4]


def test_categories_of_the_format_keep_their_ids(tmp_path: Path) -> None:
    known = [Category(30, "dog"), Category(7, "cat")]
    part = finish({"all": table(tmp_path, ("a.png", "dog"))}, known)["all"]
    assert part.categories == (Category(7, "cat"), Category(30, "dog"))
    assert part.box_class.tolist() == [1]
    assert part.own_ids


def test_nothing_to_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"boxes\.txt: no images found"):
        finish({"all": table(tmp_path)})
    empty = table(tmp_path)
    empty.image(tmp_path / "a.png", (10, 20))
    with pytest.raises(DataError, match="no box and no list of categories"):
        finish({"all": empty})
    with pytest.raises(DataError, match=r"a\.png must have a positive width .* found 20 x 0"):
        table(tmp_path).image(tmp_path / "a.png", (0, 20))


def test_splits_are_told_by_the_names_of_folders(tmp_path: Path) -> None:
    for name in ("Valid", "training", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "test").touch()
    found = split_folders(tmp_path)
    assert found == {"train": tmp_path / "training", "val": tmp_path / "Valid"}
    assert (split_name("DEV"), split_name("images")) == ("val", None)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "._a.jpg", "a.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.jpg", "b.PNG"]


@pytest.mark.parametrize("value", ["1e10", "nan", True, None, "x", [1], 10**400])
def test_what_is_no_number_of_a_sane_size_is_refused(value: object) -> None:
    assert to_number("2.5", "here") == 2.5
    with pytest.raises(DataError, match=r"here: expected a number up to 1e\+09, found"):
        to_number(value, "here")


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_text(file) == "[1]"
    assert read_json(file) == [1]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="file is no text in UTF-8"):
        read_text(file)
    with pytest.raises(DataError, match=r"cannot read .*file as json"):
        read_json(file)
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        read_json(file)
    file.write_text("<a>")
    with pytest.raises(DataError, match="file is no XML, or it is damaged"):
        read_xml(file)
    file.write_text('<!DOCTYPE a [<!ENTITY b "c">]><a/>')
    with pytest.raises(DataError, match="defines XML entities"):
        read_xml(file)


def test_the_entries_of_a_json_list_come_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "list.json"
    for text in ('[{"a": 1}, [2]]', '\ufeff[{"a": 1}, [2]]'):
        file.write_text(text, encoding="utf-8")
        assert list(read_json_list(file)) == [{"a": 1}, [2]]
    file.write_text("[NaN]")
    (number,) = read_json_list(file)
    assert number != number
    for content, message in (
        (b'{"a": 1}', "expected a list, found {'a': 1}"),
        (b'[{"a": "\xff"}]', "as json"),
        (b'[{"a": 1}', "as json"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_json_list(file))
