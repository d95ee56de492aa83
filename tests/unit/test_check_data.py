"""What `check-data` finds, and conversion there and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from detrelay.apps.check_data import Arguments, check_data
from detrelay.apps.contact_sheet import draw_contact_sheet
from detrelay.apps.drawing import class_color
from detrelay.core.data.agreement import compare_others
from detrelay.core.data.annotations import Annotations
from detrelay.core.data.checking import check_split
from detrelay.core.data.pictures import check_light, check_pair, check_recurring, look_at_images
from detrelay.core.data.places import open_place
from detrelay.core.data.writing import WRITERS, write_data
from detrelay.core.errors import DataError
from factories_data import coco_content, noise_image, write_coco
from factories_formats import write_format

# Ids with gaps, fractions of pixels, a box of no area, one that leaves its image, one given twice.
BOXES = [
    {"id": 7, "image_id": 11, "category_id": 3, "bbox": [0.123456789, 1.25, 8.1, 6], "area": 30.5},
    {"id": 5, "image_id": 5, "category_id": 90, "bbox": [-2, 3, 10, 20]},
    {"id": 0, "image_id": 11, "category_id": 90, "bbox": [30, 20, 10, 10]},
    {"id": 9, "image_id": 11, "category_id": 90, "bbox": [30, 20, 10, 10]},
    {"id": 12, "image_id": 5, "category_id": 3, "bbox": [4, 4, 0, 3]},
]
CROWD = {"id": 2, "image_id": 11, "category_id": 3, "bbox": [0, 0, 30, 20], "iscrowd": 1}


def splits(folder: Path, *, crowd: bool) -> dict[str, Annotations]:
    """Two splits in COCO, images of the first in a folder of their own."""
    content = coco_content()
    content["annotations"] = [*BOXES, CROWD] if crowd else BOXES
    content["categories"].append({"id": 50, "name": "никто"})
    write_coco(folder, content).rename(folder / "train.json")
    val = coco_content()
    val["images"] = [{"id": 44, "file_name": "v.png", "width": 20, "height": 20}]
    val["annotations"] = [{"id": 77, "image_id": 44, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    val["categories"] = content["categories"]
    write_coco(folder, val).rename(folder / "val.json")
    return dict(open_place(str(folder)).splits)


@pytest.mark.parametrize("name", WRITERS)
def test_conversion_there_and_back_keeps_everything(name: str, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    holds_crowds = name in ("coco", "parquet")
    before = splits(tmp_path / "from", crowd=holds_crowds)
    assert write_data(before, name, tmp_path / "to") == []
    found = open_place(str(tmp_path / "to"))
    assert found.format == {"parquet": "hub"}.get(name, name)
    assert list(found.splits) == ["train", "val"]
    for split, part in found.splits.items():
        was, now = before[split].to_coco(), part.to_coco()
        assert now["categories"] == was["categories"]
        assert [image["id"] for image in now["images"]] == [image["id"] for image in was["images"]]
        assert part.sizes.tolist() == before[split].sizes.tolist()
        rows = {row["id"]: row for row in now["annotations"]}
        assert rows.keys() == {row["id"] for row in was["annotations"]}
        for row in was["annotations"]:
            again = rows[row["id"]]
            assert again["bbox"] == pytest.approx(row["bbox"], abs=1e-6)
            assert again["area"] == pytest.approx(row["area"], abs=1e-6)
            for key in ("image_id", "category_id", "iscrowd"):
                assert again[key] == row[key]
        for row in range(len(part)):
            old, new = (pixels(one, row) for one in (before[split], part))
            assert np.array_equal(old, new)


def pixels(part: Annotations, row: int) -> np.ndarray:
    with Image.open(part.images.open(row)) as image:
        return np.array(image)


@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_what_a_format_cannot_hold_is_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    before = splits(tmp_path / "from", crowd=True)
    (note,) = write_data(before, name, tmp_path / "to")
    assert "1 crowd boxes of train left out" in note
    assert sum(len(part.box_ids) for part in open_place(str(tmp_path / "to")).splits.values()) == 6


def test_ids_of_files_that_were_changed_are_numbered_anew(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    write_data(splits(tmp_path / "from", crowd=False), "yolo", tmp_path / "to")
    (tmp_path / "to" / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.2 0.2")
    train = open_place(str(tmp_path / "to")).splits["train"]
    assert train.image_ids.tolist() == [1, 2, 3]
    assert "ids are renumbered" in train.notes[-1]
    (tmp_path / "to" / "detrelay_ids.json").write_text("[")
    with pytest.raises(DataError, match=r"cannot read the ids in .*detrelay_ids\.json"):
        open_place(str(tmp_path / "to"))


def test_writing_refuses_what_is_not_clear(tmp_path: Path) -> None:
    place, _ = write_format("voc", tmp_path / "voc")
    found = open_place(place)
    with pytest.raises(DataError, match="unknown format to write yol; did you mean yolo"):
        write_data(found.splits, "yol", tmp_path / "to")
    with pytest.raises(DataError, match="exists and is not empty"):
        write_data(found.splits, "yolo", tmp_path / "voc")


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


def test_a_contact_sheet_shows_images_boxes_and_histograms(tmp_path: Path) -> None:
    target = tmp_path / "sheet.png"
    part = splits(tmp_path, crowd=True)["train"]
    draw_contact_sheet(part, "train", target)
    with Image.open(target) as image:
        sheet = np.array(image.convert("RGB"))
    assert sheet.shape[1] > 800
    for color in (class_color(0), class_color(2)):  # boxes, and bars of their category
        upper, lower = np.split((np.abs(sheet.astype(int) - color) < 8).all(2), 2)
        assert upper.sum() > 50
        assert lower.sum() > 500


def test_captions_do_not_cover_small_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    content = coco_content()
    content["images"] = [{"id": 11, "file_name": "a.png", "width": 400, "height": 400}]
    content["annotations"] = [
        {"id": side, "image_id": 11, "category_id": 3, "bbox": [9, 9, side, 20]}
        for side in (30, 59, 60, 200)
    ]
    write_coco(tmp_path, content)
    noise_image(400, 400).save(tmp_path / "images" / "a.png")
    (part,) = open_place(str(tmp_path)).splits.values()
    monkeypatch.setattr(
        "detrelay.apps.contact_sheet.draw_boxes",
        lambda image, boxes, labels, captions: shown.append(captions) or image,
    )
    draw_contact_sheet(part, "all", tmp_path / "sheet.png")
    assert shown == [["", "", "wheel", "wheel"]]


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


def test_crowded_images_and_single_boxes_are_remarked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": row, "image_id": 11, "category_id": 3, "bbox": [row / 9, 0, 5, 5]}
        for row in range(1, 102)
    ]
    content["annotations"].append(
        {"id": 500, "image_id": 5, "category_id": 90, "bbox": [0, 0, 5, 5]}
    )
    (part,) = open_place(str(write_coco(tmp_path, content))).splits.values()
    found = {defect.what: defect.examples for defect in check_split(part).defects}
    assert found["images have more than 100 boxes: mind num_queries and max_detections"] == [
        "a.png"
    ]
    assert found["categories have a single box"] == ["door"]


def test_pictures_that_recur_inside_a_split_are_named(tmp_path: Path) -> None:
    content = coco_content()
    write_coco(tmp_path, content)
    images = tmp_path / "images"
    part = open_place(str(tmp_path)).splits["all"]
    assert check_recurring(part, look_at_images(part)) is None
    names = [part.images.name(row) for row in range(len(part))]
    with Image.open(images / names[0]) as image, Image.open(images / names[2]) as other:
        image.resize(other.size).save(images / names[2])  # the same picture in another size
    found = check_recurring(part, look_at_images(part))
    assert found is not None
    assert (found.count, found.blocks) == (1, False)
    (example,) = found.examples
    assert example.startswith(f"{names[2]} is like {names[0]}: correlation 0.9")


def test_a_category_that_outweighs_the_others_is_remarked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": row, "image_id": 11, "category_id": 90 if row < 3 else 3, "bbox": [row, 0, 5, 5]}
        for row in range(1, 12)
    ]
    write_coco(tmp_path, content)
    (part,) = open_place(str(tmp_path)).splits.values()
    (found,) = check_split(part).defects
    assert found.what.startswith("boxes of wheel are 82% of all")
    assert found.count == 9


def many(folder: Path, sizes: list[tuple[int, int]]) -> Annotations:
    """A set of images of these (width, height), each with a wheel and a door."""
    content = coco_content()
    content["images"] = [
        {"id": n, "file_name": f"{n}.png", "width": w, "height": h}
        for n, (w, h) in enumerate(sizes)
    ]
    content["annotations"] = [
        {
            "id": 2 * n + k,
            "image_id": n,
            "category_id": (3, 90)[k - 1],
            "bbox": [4 * k, 4 * k, 9, 9],
        }
        for n in range(len(sizes))
        for k, label in ((1, 3), (2, 90))
    ]
    folder.mkdir(exist_ok=True)
    write_coco(folder, content)
    for number, (width, height) in enumerate(sizes):
        noise_image(width, height, number).save(folder / "images" / f"{number}.png")
    (part,) = open_place(str(folder)).splits.values()
    return part


def test_image_sizes_of_training_that_many_held_out_images_lack(tmp_path: Path) -> None:
    train = many(tmp_path / "train", [(20, 20)] * 4 + [(24, 20)])
    val = many(tmp_path / "val", [(20, 20)] * 30)
    sides = [(name, part, look_at_images(part)) for name, part in (("train", train), ("val", val))]
    found = {defect.what: defect for defect in check_pair(sides[0], sides[1])}
    defect = found["images of train have a size that val lacks: another camera?"]
    assert (defect.count, defect.examples) == (1, ["24x20"])
    few = val.select(np.arange(20))  # (4 / 5) ** 20 is above a hundredth: it may be chance
    sides[1] = ("val", few, look_at_images(few))
    assert not any("lacks" in d.what for d in check_pair(sides[0], sides[1]))


def test_images_without_the_boxes_that_others_have_are_named(tmp_path: Path) -> None:
    part = many(tmp_path, [(20, 20)] * 10)
    assert check_split(part).defects == []
    kept = ~((part.box_image == 7) & (part.box_class == 1))
    (defect,) = check_split(part.with_boxes(kept)).defects
    assert defect.what == "images have no door, which 90% have: forgotten boxes?"
    assert (defect.count, defect.examples) == (1, ["7.png"])
    rare = ~((part.box_image > 3) & (part.box_class == 1))
    assert check_split(part.with_boxes(rare)).defects == []  # most images have no door
    assert check_split(part.select(np.arange(9)).with_boxes(kept[:18])).defects == []  # too few


def test_images_with_few_boxes_of_a_crowd_are_named(tmp_path: Path) -> None:
    content = coco_content()
    content["images"] = [
        {"id": n, "file_name": f"{n}.png", "width": 90, "height": 90} for n in range(10)
    ]
    content["annotations"] = [
        {"id": 100 * n + k, "image_id": n, "category_id": 3, "bbox": [8 * k, 8 * n, 7, 7]}
        for n in range(10)
        for k in range(1, 3 if n == 4 else 10)
    ]
    (part,) = open_place(str(write_coco(tmp_path, content))).splits.values()
    (defect,) = check_split(part).defects
    assert defect.what == "images have fewer than a third of the usual 9 boxes of wheel: forgotten?"
    assert defect.examples == ["4.png"]


def test_dark_and_blurred_images_are_named(tmp_path: Path) -> None:
    part = many(tmp_path, [(60, 40)] * 5)
    image = Image.new("RGB", (60, 40), (90, 120, 100))
    ImageDraw.Draw(image).rectangle((15, 10, 40, 30), (220, 200, 180))
    for row in range(5):
        image.save(tmp_path / "images" / f"{row}.png")
    assert check_light(part, look_at_images(part)) == []
    image.point(lambda value: value // 8).save(tmp_path / "images" / "1.png")  # as sharp
    image.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "images" / "2.png")
    Image.new("RGB", (60, 40), (200, 200, 200)).save(tmp_path / "images" / "4.png")  # no edge
    dark, blurred = check_light(part, look_at_images(part))
    assert dark.what == "images are dark (mean grey under 40 of 255)"
    assert dark.examples == ["1.png"]
    assert blurred.what == "images are blurred beside the others of their split"
    assert blurred.examples == ["2.png"]


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


def test_a_box_with_the_id_0_is_remarked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": n, "image_id": 11, "category_id": 3, "bbox": [9 * n, 0, 5, 5]} for n in range(3)
    ]
    (part,) = open_place(str(write_coco(tmp_path, content))).splits.values()
    (defect,) = check_split(part).defects
    assert defect.what.startswith("box has the id 0: pycocotools takes a hit on it for a miss")
    assert defect.examples == ["a.png: wheel [0, 0, 5, 5] (id 0)"]


def test_boxes_that_touch_a_border_but_for_rounding_lie_inside(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = [
        {"id": 1, "image_id": 11, "category_id": 3, "bbox": [0, 0, 40.0003, 30.0002]},
        {"id": 2, "image_id": 11, "category_id": 90, "bbox": [-0.0003, 0, 9, 9]},
        {"id": 3, "image_id": 11, "category_id": 90, "bbox": [31.5, 0, 9, 9]},
    ]
    write_coco(tmp_path, content)
    (part,) = open_place(str(tmp_path)).splits.values()
    outside = [d for d in check_split(part).defects if "partly outside" in d.what]
    assert [(defect.count, len(defect.examples)) for defect in outside] == [(1, 1)]


def test_a_split_without_any_box_is_checked(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"] = []
    write_coco(tmp_path, content)
    (part,) = open_place(str(tmp_path)).splits.values()
    checked = check_split(part)
    assert (checked.boxes, checked.images_without_boxes) == (0, len(part))
    draw_contact_sheet(part, "all", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


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
