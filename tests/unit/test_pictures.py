"""Defects reported for the images of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from detrelay.core.data.pictures import check_light, check_pair, check_recurring, look_at_images
from detrelay.core.data.places import open_place
from factories_data import coco_content, many, write_coco


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
