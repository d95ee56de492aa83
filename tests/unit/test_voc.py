"""Pascal VOC."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.places import open_place
from detrelay.core.errors import DataError
from factories_formats import WRITERS, only, picture


def voc(folder: Path, objects: str, size: str = "", name: str = "a.jpg", head: str = "") -> Path:
    picture(folder / "a.jpg")
    size = size or "<size><width>64</width><height>48</height><depth/></size>"
    text = f"{head}<annotation><filename>{name}</filename>{size}{objects}</annotation>"
    (folder / "a.xml").write_bytes(text.encode())
    return folder


def voc_object(*corners: object, name: str = "cat", more: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{v}</{key}>" for key, v in zip(keys, corners, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{box}</bndbox></object>"


@pytest.mark.parametrize(
    ("options", "box", "note"),
    [
        ({"objects": voc_object(8, 6, 28, 22)}, [8, 6, 20, 16], None),
        ({"objects": voc_object("8.0", 0, "28.5", 22)}, [8, 0, 20.5, 22], None),
        ({"objects": voc_object(28, 6, 8, 22)}, [28, 6, -20, 16], None),  # dropped later, counted
        ({"objects": voc_object(8, 6, 28, 22), "size": " "}, [8, 6, 20, 16], "give no size"),
        (
            {
                "objects": voc_object(8, 6, 28, 22),
                "size": "<size><width>0</width><height>0</height></size>",
            },
            [8, 6, 20, 16],
            "give no size",
        ),
        ({"objects": voc_object(8, 6, 28, 22), "name": "b.jpg"}, [8, 6, 20, 16], "name another"),
        ({"objects": voc_object(8, 6, 28, 22), "name": "a"}, [8, 6, 20, 16], None),
        ({"objects": voc_object(8, 6, 28, 22, name=" cat\n")}, [8, 6, 20, 16], None),
        (
            {"objects": voc_object(8, 6, 28, 22, more="<difficult>1</difficult>")},
            [8, 6, 20, 16],
            "1 boxes are marked difficult",
        ),
        ({"objects": voc_object(8, 6, 28, 22), "head": "\ufeff"}, [8, 6, 20, 16], None),
    ],
)
def test_voc_files(
    tmp_path: Path, options: dict[str, str], box: list[float], note: str | None
) -> None:
    part = only(voc(tmp_path, **options))
    assert part.boxes_xywh.tolist() == [box]
    assert part.categories[0].name == "cat"
    assert part.sizes.tolist() == [[48, 64]]
    assert (not part.notes) if note is None else (note in part.notes[0])


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("<object>", "a.xml is no XML, or it is damaged"),
        (voc_object(8, "six", 28, 22), "a.xml object 1 <ymin>: expected a number .* 'six'"),
        (voc_object(8, "inf", 28, 22), "object 1 <ymin>: expected a number"),
        (voc_object(8, "", 28, 22), "object 1 <ymin>: expected a number .* ''"),
        (voc_object(8, 6, 28, 22, name=""), "object 1: has no <name>"),
        ("", "no box and no list of categories"),
    ],
)
def test_voc_files_that_are_refused(tmp_path: Path, objects: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_place(str(voc(tmp_path, objects)))


def test_xml_with_entities_is_refused(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;">]>'
    for text in (f"{bomb}<annotation>&c;</annotation>", f"{bomb}<annotations>&c;</annotations>"):
        picture(tmp_path / "a.jpg")
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / "a.xml").write_bytes(text.encode(encoding))
            format_name = "voc" if "<annotation>" in text else "cvat"
            place = tmp_path if format_name == "voc" else tmp_path / "a.xml"
            with pytest.raises(DataError, match="defines XML entities"):
                open_place(f"{format_name}:{place}")


def test_a_list_to_test_on_may_come_without_annotations(tmp_path: Path) -> None:
    WRITERS["voc"][0](tmp_path)
    lists = tmp_path / "ImageSets" / "Main"
    (lists / "test.txt").write_text("secret1\nsecret2\n")
    found = open_place(str(tmp_path))
    assert list(found.splits) == ["train", "val"]
    assert "2 entries of the list test, none of which has an XML file, left out" in (
        found.splits["train"].notes
    )
    (lists / "test.txt").write_text("secret1\nd\n")
    with pytest.raises(DataError, match=r"1 of 2 entries of the list test have no XML file"):
        open_place(str(tmp_path))
