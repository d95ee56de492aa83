"""Boxes in CSV files of several dialects."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import only, picture


def table(folder: Path, text: str) -> Path:
    picture(folder / "images" / "a.jpg")
    picture(folder / "images" / "b c.jpg")
    (folder / "boxes.csv").write_bytes(text.encode())
    return folder / "boxes.csv"


HEAD = "filename,width,height,class,xmin,ymin,xmax,ymax\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "a.jpg,64,48,cat,8,6,28,22\n",
        "\ufeff" + HEAD + "a.jpg,64,48,cat,8,6,28,22\r\n",
        (HEAD + "a.jpg,64,48,cat,8,6,28,22").replace(",", ";"),
        ",image_path,xmin,xmax,ymin,ymax,label\n0,a.jpg,8,28,6,22,cat\n",
        '"image","xmin","ymin","xmax","ymax","label"\n"a.jpg","8.0","6.0","28.0","22.0","cat"\n',
        'image;xmin;ymin;xmax;ymax;label\na.jpg;"8,0";6;28;22;cat\n',
        "images/a.jpg,8,6,28,22,cat\n",
        r"C:\data\images\a.jpg,8,6,28,22,cat",
    ],
)
def test_dialects_of_csv(tmp_path: Path, text: str) -> None:
    part = only(table(tmp_path, text))
    assert part.boxes_xywh.tolist() == [[8, 6, 20, 16]]
    assert part.categories[0].name == "cat"
    assert "1 images beside them have no row" not in part.notes or len(part) == 1


def test_images_without_objects_in_csv(tmp_path: Path) -> None:
    text = HEAD + "a.jpg,64,48,cat,8,6,28,22\nb%20c.jpg,64,48,cat,0,0,0,0\n"
    part = only(table(tmp_path, text))
    assert [part.images.name(row) for row in range(2)] == ["images/a.jpg", "images/b c.jpg"]
    assert part.box_image.tolist() == [0]
    assert any("rows of zeros taken as images without objects" in note for note in part.notes)
    part = only(table(tmp_path, "images/a.jpg,8,6,28,22,cat\nimages/b c.jpg,,,,,\n"))
    assert (len(part), len(part.box_ids)) == (2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,64,48,cat,8,6,28,22\n", "its first line must name the columns"),
        (HEAD + "a.jpg,64,48,cat,8\n", "boxes.csv line 2: expected 8 columns, found 5"),
        (HEAD + "a.jpg,64,48,cat,8,six,28,22\n", "line 2: expected a number .*'six'"),
        (HEAD + "a.jpg,64,48,,8,6,28,22\n", "line 2: the box has no class"),
        (HEAD + "z.jpg,64,48,cat,8,6,28,22\n", r"1 of its images are not in .*: z\.jpg"),
        ("filename,class,xmin,ymin,xmax,ymax,score\n", "detections are no truth"),
        ("", "is empty"),
        (HEAD, "no images found"),
        (HEAD + 'a.jpg,64,48,"cat\0,8,6,28,22\n', "boxes.csv"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(table(tmp_path, text)))
