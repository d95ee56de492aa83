"""Contact sheets: images, boxes, histograms, and captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrelay.apps.contact_sheet import draw_contact_sheet
from detrelay.apps.drawing import class_color
from detrelay.core.data.places import open_place
from factories_data import coco_content, noise_image, splits, write_coco


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
