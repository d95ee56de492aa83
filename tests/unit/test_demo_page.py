"""The page of the demo, built but not served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detrelay.apps.detector import Choice, Detector
from detrelay.apps.stage_view import (
    detections,
)
from detrelay.assigners import build_assigners
from detrelay.core.data.coco import CocoDataset
from detrelay.core.data.image_processing import DetrelayImageProcessor
from factories_data import noise_image, write_coco
from hub_model import NAMES, small_model
from tiny_run import shrink_backbone

pytest.importorskip("gradio", reason="needs gradio (the extra `demo`)")
import gradio

from detrelay.apps.demo_page import Demo, build_page, read_objects

# what has learned nothing takes whole images for objects
OBJECTS = "circle 0 0 48 32\ncross | x 4 0 40 32"


@pytest.fixture(scope="module")
def page_demo() -> Demo:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        model = small_model()
    own, learned = (
        build_assigners(name, model.loss_config)["decoder"] for name in ("hungarian", "cross_stage")
    )
    processor = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return Demo("runs/best", model, processor, (own, learned))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    noise_image(48, 32).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_the_last_stage_detects_what_predict_finds(page_demo: Demo, photo: str) -> None:
    view = page_demo.look(photo, "")
    choice = Choice(threshold=0.0, nms_iou_threshold=None)
    (expected,) = Detector(page_demo.model, page_demo.processor, choice)([view.pixels])
    found = detections(view, len(view.stages) - 1, page_demo.processor, 0.0, None)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)
    earlier = detections(view, 0, page_demo.processor, 0.0, None)
    assert not torch.equal(earlier["scores"], found["scores"])
    fewer = detections(view, 0, page_demo.processor, 0.0, 0.3)
    assert len(fewer["scores"]) < len(earlier["scores"])
    assert page_demo.processor.nms_iou_threshold is None


def test_a_stage_is_shown_with_and_without_objects(page_demo: Demo, photo: str) -> None:
    shown = page_demo.show(page_demo.look(photo, ""), 1, 0.0, 1.0)
    assert shown.labelled is None
    assert shown.rows == []
    assert shown.summary == "Stage 1: 32 detections. Name objects to see whose labels travel."
    view = page_demo.look(photo, OBJECTS)
    shown = page_demo.show(view, 2, 1.0, 1.0)
    assert shown.labelled is not None
    assert not np.array_equal(shown.labelled, shown.detected)
    own = [row for row in shown.rows if row[3] == "own"]
    assert len(own) == 2
    assert {row[2] for row in own} == {"circle", "cross | x"}
    told = rf"Stage 2: 0 detections; 2 objects, 2 labels of its own .*, {len(shown.rows) - 2} from"
    assert re.match(told, shown.summary)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("circle 1 2 3", "objects, line 1: expected class, left, top, width, height; found"),
        ("circle 1 2 3 x", "objects, line 1: expected class"),
        ("\n\ncicle 1 2 3 4", "objects, line 3: class 'cicle': did you mean circle?"),
        (
            "ring 1 2 0 4",
            "objects, line 1: the box is empty or extends outside the image, which is 48 x 32",
        ),
        ("ring 40 2 20 4", "objects, line 1: the box is empty or extends outside the image"),
        ("ring 4 2 nan 4", "objects, line 1: the box is empty or extends outside the image"),
    ],
)
def test_objects_that_cannot_be_read_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_objects(text, NAMES, (32, 48))


def test_objects_are_read() -> None:
    text = "circle, 4, 2, 20, 16\n\n cross | x  30 10 12 14"
    found = read_objects(text, NAMES, (32, 48))
    assert found is not None
    assert found.labels.tolist() == [0, 3]
    assert found.boxes_xyxy.tolist() == [[4, 2, 24, 18], [30, 10, 42, 24]]
    assert read_objects("\n", NAMES, (32, 48)) is None


def test_images_of_a_dataset_bring_their_objects(page_demo: Demo, tmp_path: Path) -> None:
    samples = CocoDataset(write_coco(tmp_path))
    with_data = Demo(
        page_demo.title, page_demo.model, page_demo.processor, page_demo.assigners, samples, [2, 3]
    )
    assert with_data.choices() == [("a.png", 0), ("b.png", 1), ("c.png", 2)]
    picture, text = with_data.chosen(0)
    assert picture.shape == (30, 40, 3)
    assert text.splitlines() == ["ring 0.5 1.25 8 6", "cross | x 30 20 10 10"]
    found = read_objects(text, NAMES, (30, 40))
    assert found is not None
    assert torch.equal(found.boxes_xyxy, samples[0].boxes_xyxy)
    assert page_demo.choices() == []


def test_the_page_is_built_and_its_functions_answer(page_demo: Demo, photo: str) -> None:
    page = build_page(page_demo)
    functions: dict[str, Any] = {
        str(entry.api_name): entry.fn for entry in page.fns.values() if entry.api_name
    }
    view = functions["look"](photo, OBJECTS)
    detected, labelled, rows, told = functions["show"](view, 2, 0.0, 1.0)
    assert detected.shape == labelled.shape == (320, 480, 3)
    assert len(rows) >= 2
    assert told.startswith("Stage 2: ")
    assert functions["show"](functions["look"](None, ""), 2, 0.0, 1.0) == [None, None, [], ""]
    with pytest.raises(Exception, match="did you mean circle") as refused:
        functions["look"](photo, "cicle 1 1 5 5")
    assert type(refused.value).__name__ == "Error"  # which gradio shows to the user
    sliders = [block for block in page.blocks.values() if isinstance(block, gradio.Slider)]
    slider = next(block for block in sliders if block.label == "decoder stage")
    assert (slider.maximum, slider.value) == (4, 4)


def test_the_image_is_read_as_it_is_stored(page_demo: Demo, tmp_path: Path) -> None:
    """Upright, as training reads it."""
    path = tmp_path / "turned.jpg"
    image = noise_image(48, 32)
    exif = Image.Exif()
    exif[274] = 6
    image.save(path, exif=exif)
    assert page_demo.look(str(path), "").pixels.shape == (3, 48, 32)
