"""Other annotations of the same images."""

from __future__ import annotations

import json
from pathlib import Path

from detrelay.core.data.agreement import compare_others
from detrelay.core.data.places import open_place
from detrelay.core.data.writing import write_data
from factories_data import many


def test_other_annotations_of_the_same_images_are_compared(tmp_path: Path) -> None:
    many(tmp_path, [(20, 20)] * 3)
    head = "filename,class,xmin,ymin,xmax,ymax\n"
    rows = ["0.png,wheel,4,4,13,13", "0.png,door,8,8,17,17", "1.png,wheel,4,4,13,13"]
    for image in (tmp_path / "images").iterdir():
        image.rename(tmp_path / image.name)
    (tmp_path / "same.csv").write_text(head + "\n".join(rows[:2]))
    (tmp_path / "other.csv").write_text(
        head
        + "\n".join(
            [*rows, "1.png,wheel,9,9,14,14", "2.png,wheel,4,4,13,13", "2.png,cat,8,8,17,17"]
        )
    )
    (tmp_path / "scores.csv").write_text(head.replace("class", "score,class"))
    found = open_place(str(tmp_path))
    assert found.format == "coco"
    defects, unread = compare_others(found)
    (defect,) = defects
    assert defect.what == f"images have other boxes in {tmp_path}/other.csv than in the coco files"
    assert defect.examples == [
        "1.png: 2 boxes here, 2 there; 1 boxes only here, 1 only there",
        "2.png: 2 boxes here, 2 there; 1 of another category",
    ]
    assert len(unread) == 1
    assert "scores.csv has a column of scores" in unread[0]


def test_two_formats_in_one_folder_are_compared(tmp_path: Path) -> None:
    place = tmp_path / "set"
    many(place, [(20, 20)] * 3)
    write_data(open_place(str(place)).splits, "voc", tmp_path / "voc")
    for file in [*(place / "images").iterdir(), *(tmp_path / "voc").rglob("*.xml")]:
        file.rename(place / file.name)
    found = open_place(str(place))
    assert (found.format, found.also) == ("coco", ("voc",))
    assert compare_others(found) == ([], [])
    content = json.loads((place / "instances.json").read_text())
    del content["annotations"][2]
    (place / "instances.json").write_text(json.dumps(content))
    (defect,), _ = compare_others(open_place(str(place)))
    assert defect.what == f"images have other boxes in voc:{place} than in the coco files"
    assert defect.examples == ["1.png: 1 boxes here, 2 there; 1 only there"]
