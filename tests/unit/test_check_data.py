"""What `check-data` finds, and conversion there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detrelay.apps.check_data import Arguments, check_data
from detrelay.core.data.places import open_place
from factories_data import coco_content, many, noise_image, splits, write_coco
from factories_formats import write_format


def faulty(folder: Path) -> Path:
    splits(folder, crowd=True)
    (folder / "images" / "spare.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "v.png").unlink()
    noise_image(20, 20, 8).save(folder / "images" / "v.png")  # as c.png of the training images
    return folder


def test_every_defect_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = faulty(tmp_path)
    output = tmp_path / "check"
    sheets: list[str] = []
    monkeypatch.setattr(
        "detrelay.apps.contact_sheet.draw_contact_sheet",
        lambda _, title, target: sheets.append(f"{title}: {target.name}"),
    )
    assert check_data(Arguments((str(place),), output=output)) == 3
    shown = capsys.readouterr().out
    for words in (
        "1 boxes without area",
        "b.png: wheel [4, 4, 0, 3] (id 12)",
        "1 boxes partly outside their image",
        "1 boxes that repeat another of their class",
        "1 images of val look like one of train",
        "v.png (val) is like c.png (train): correlation 1.000",
        "1 image files are named by no annotation",
        "images/spare.png",
        "1 categories have no box anywhere (никто)",
        "verdict: usable, but look at this first",
    ):
        assert words in shown
    content = json.loads((output / "check.json").read_text())
    train = content["splits"]["train"]
    assert (train["images"], train["boxes"], train["crowd_boxes"]) == (3, 6, 1)
    assert train["images_without_boxes"] == 1
    assert train["boxes_per_category"] == {"wheel": 3, "никто": 0, "door": 3}
    assert sum(train["boxes_by_size"].values()) == 6
    assert sheets == [f"{split}: contact_sheet_{split}.png" for split in ("train", "val")]


def test_images_that_cannot_be_used_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = faulty(tmp_path)
    (place / "images" / "a.png").write_text("no image")
    noise_image(9, 9).save(place / "images" / "b.png")
    assert check_data(Arguments((str(place),), output=tmp_path / "check")) == 2
    shown = capsys.readouterr().out
    assert "verdict: unusable: 2 images cannot be used" in shown
    assert "a.png" in shown
    assert "b.png is 9 x 9 pixels" in shown
    assert check_data(Arguments((str(place),), skip_images=True)) == 3
    (place / "images" / "c.png").unlink()
    assert check_data(Arguments((str(place),))) == 2
    assert "verdict: unusable: 1 images are missing" in capsys.readouterr().out


def test_clean_data_are_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, split in enumerate(("train", "val")):
        (tmp_path / split).mkdir()
        content = coco_content()
        content["images"] = content["images"][:1]
        content["annotations"] = [
            {"id": row, "image_id": 11, "category_id": category, "bbox": [row, row, 9, 9]}
            for row, category in ((1, 3), (12, 90), (20, 3), (6, 90))
        ]
        write_coco(tmp_path / split, content)
        noise_image(40, 30, 50 + number).save(tmp_path / split / "images" / "a.png")
    places = (f"train={tmp_path}/train", f"val={tmp_path}/val")
    assert check_data(Arguments(places)) == 0
    assert "verdict: ready to train" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--data: expected a place, or train=PLACE val=PLACE"):
        check_data(Arguments(("a", "b")))


def test_check_data_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, _ = write_format("labelme", tmp_path / "from")
    arguments = Arguments((place,), write="yolo", output=tmp_path / "to")
    assert check_data(arguments) == 0
    assert "written as the split train" in capsys.readouterr().out
    found = open_place(str(tmp_path / "to"))
    assert (found.format, list(found.splits)) == ("yolo", ["train"])
    with pytest.raises(ValueError, match="--write needs --output"):
        check_data(Arguments((place,), write="yolo"))


def test_all_examples_are_in_the_json_and_few_in_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = many(tmp_path, [(20, 20)] * 8)
    for row in range(1, 8):
        (tmp_path / "images" / f"{row}.png").write_bytes((tmp_path / "images/0.png").read_bytes())
    assert check_data(Arguments((str(tmp_path),), output=tmp_path / "check")) == 3
    shown = capsys.readouterr().out
    assert "7 images look like an earlier one of their split" in shown
    assert shown.count(" is like ") == 5
    assert "and 2 more" in shown
    content = json.loads((tmp_path / "check" / "check.json").read_text())
    (defect,) = content["splits"]["all"]["defects"]
    assert len(defect["examples"]) == len(part) - 1


def test_categories_that_differ_in_case_only_are_remarked_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = coco_content()
    content["categories"].append({"id": 50, "name": "Wheel"})
    write_coco(tmp_path, content)
    assert check_data(Arguments((str(tmp_path),), skip_images=True)) == 3
    body, _, verdict = capsys.readouterr().out.partition("verdict:")
    for text in (body, verdict):
        assert text.count("categories Wheel and wheel differ in case only") == 1
