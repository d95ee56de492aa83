"""YOLO: rows, data.yaml, and lists of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import only, picture, write_format


def yolo(folder: Path, labels: str, yaml: str | None = None) -> Path:
    picture(folder / "images" / "a.jpg")
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_bytes(labels.encode())
    text = "train: images\nnames: ['cat', 'dog', 'cow']\n" if yaml is None else yaml
    (folder / "data.yaml").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("labels", "count", "note"),
    [
        ("0 0.5 0.5 0.2 0.2\r\n1\t0.5\t0.5\t0.1\t0.1\r\n\r\n", 2, None),
        ("0.0 0.5 0.5 0.2 0.2", 1, None),
        ("dog 0.5 0.5 0.2 0.2", 1, None),
        ("0 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n", 1, "1 rows given twice left out"),
        ("0 1.0004 0.5 0.2 0.2", 1, None),
        ("0 -0.01 0.5 0.2 0.2", 1, None),
        ("0 0.1 0.1 0.3 0.1 0.2 0.4", 1, "1 polygons or rotated boxes became"),
        ("\ufeff0 0.5 0.5 0.2 0.2", 1, None),
    ],
)
def test_yolo_rows(tmp_path: Path, labels: str, count: int, note: str | None) -> None:
    part = only(yolo(tmp_path, labels))
    assert len(part.box_ids) == count
    assert (not part.notes) if note is None else (note in part.notes[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("0 32 24 12.8 9.6", "line 1: expected fractions of the image .* found 32"),
        ("0 0.5 0.5 0.2 0.2\n7 0.5 0.5 0.2 0.2", r"line 2: class '7' is not among the 3 names"),
        ("0.5 0.5 0.5 0.2 0.2", "class '0.5' is not among"),
        ("horse 0.5 0.5 0.2 0.2", "class 'horse' is not among"),
        ("-1 0.5 0.5 0.2 0.2", "class '-1' is not among"),
        ("nan 0.5 0.5 0.2 0.2", "class 'nan' is not among"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line 1: .* detection with its confidence"),
        ("0 0.5 0.5 0.2", "line 1: expected a class and 4 numbers .* found 3"),
        ("0,0.5,0.5,0.2,0.2", "line 1: class '0,0.5"),
        ("0 0.5 0.5 0.2 nan", "line 1: expected a number up to 1e.09, found 'nan'"),
        ("0 0.5 0.5 0.2 1e400", "expected a number"),
    ],
)
def test_yolo_rows_that_are_refused(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(yolo(tmp_path, labels)))


@pytest.mark.parametrize(
    ("yaml", "names"),
    [
        ("train: images\nnames: {0: cat, 2: dog}", [(0, "cat"), (2, "dog")]),
        ('train: images\nnames: {"0": cat, "1": dog}', [(0, "cat"), (1, "dog")]),
        ("train: images\nnames: [0, 1, yes]", [(0, "0"), (1, "1"), (2, "yes")]),
        ("train: [images, images]\nnames: [cat]\nval:\ntest: ../test/images", [(0, "cat")]),
        ("path: /content/x\ntrain: ../images\nnames: [cat]", [(0, "cat")]),
        ("train: images\nnc: 4\nnames: [cat]", [(0, "cat")]),
    ],
)
def test_yaml_of_yolo(tmp_path: Path, yaml: str, names: list[tuple[int, str]]) -> None:
    part = only(yolo(tmp_path, "0 0.5 0.5 0.2 0.2", yaml))
    assert [(category.id, category.name) for category in part.categories] == names
    assert len(part) == 1
    told = {"nc: 4": "1 names in data.yaml, where it says there are 4", "[images": "named twice"}
    for sign, words in told.items():
        if sign in yaml:
            assert words in part.notes[0]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: images", "names must be a list .* it is missing"),
        ("train: images\nnames: 3", "names must be a list .* found '3'"),
        ("train: images\nnames: {a: cat}", "names must be numbered from 0"),
        ("train: images\nnames: [cat, cat]", "two categories have the same name"),
        ("names: [cat]", "names no images; expected the keys train and val"),
        ("train: {a: b}\nnames: [cat]", "train must be a path or a list of paths"),
        ("path: /content/x\ntrain: pictures\nnames: [cat]", "train is not there; tried .*content"),
        ("train:\timages\n\tval: images", "cannot read .*data.yaml as YAML"),
        ("[" * 3000, "cannot read .*data.yaml as YAML"),
        ("- a\n- b", "expected keys such as train"),
        ("train: labels\nnames: [cat]", "labels: no images in this folder"),
    ],
)
def test_yaml_of_yolo_that_is_refused(tmp_path: Path, yaml: str, message: str) -> None:
    yolo(tmp_path, "0 0.5 0.5 0.2 0.2", yaml)
    with pytest.raises(DataError, match=message):
        open_place(str(tmp_path / "data.yaml"))


def test_an_empty_list_of_names_is_refused(tmp_path: Path) -> None:
    place, _ = write_format("yolo_darknet", tmp_path)
    (tmp_path / "obj.names").write_text("\n")
    with pytest.raises(DataError, match=r"obj\.names: lists no category names"):
        open_place(place)


def test_a_list_may_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    picture(tmp_path / "secret.jpg")
    place = yolo(tmp_path / "set", "", "train: list.txt\nnames: [cat]")
    (place / "list.txt").write_text("../secret.jpg\n/home/me/images/a.jpg\n")
    with pytest.raises(DataError, match=r"1 of 2 images that it names are not there: \.\./secret"):
        open_place(str(place))
