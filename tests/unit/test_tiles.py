"""Tiles: where they lie, what they show of the boxes, and what is made of their detections."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from detrelay.apps import build, predict
from detrelay.core.data.coco import AnnotatedImages, CocoDataset
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.tiles import TiledImages, Window, merge, windows
from detrelay.core.errors import DataError, RecipeError
from detrelay.core.recipes.recipe import DataConfig, Recipe, override
from factories_data import coco_content, write_coco

# corners of squares in a picture of 200 x 120, and the grey of each, which is its class
SQUARES = [((10, 10, 40, 30), 100), ((90, 50, 110, 70), 150), ((150, 80, 196, 118), 200)]


def test_tiles_cover_the_image_and_overlap() -> None:
    assert windows(100, 250, 100, 0.2) == [
        Window(0, 0, 100, 100),
        Window(0, 75, 100, 100),
        Window(0, 150, 100, 100),
    ]
    assert windows(60, 80, 100, 0.5) == [Window(0, 0, 60, 80)]
    assert windows(101, 100, 100, 0.0) == [Window(0, 0, 100, 100), Window(1, 0, 100, 100)]
    for side in range(100, 700, 7):
        lefts = [tile.left for tile in windows(50, side, 100, 0.3)]
        assert lefts[0] == 0
        assert lefts[-1] + 100 == side
        steps = [b - a for a, b in itertools.pairwise(lefts)]
        assert all(0 < step <= 70 + 1 for step in steps)


def picture(folder: Path) -> AnnotatedImages:
    """A set of one picture with the squares, their greys as categories."""
    content = coco_content()
    content["images"] = [{"id": 11, "file_name": "a.png", "width": 200, "height": 120}]
    content["categories"] = [{"id": grey, "name": f"grey {grey}"} for _, grey in SQUARES]
    content["annotations"] = [
        {"id": n, "image_id": 11, "category_id": grey, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for n, ((x1, y1, x2, y2), grey) in enumerate(SQUARES, start=1)
    ]
    path = write_coco(folder, content)
    image = Image.new("RGB", (200, 120))
    for (x1, y1, x2, y2), grey in SQUARES:
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), (grey, grey, grey))
    image.save(folder / "images" / "a.png")
    return CocoDataset(path)


def tiled(samples: AnnotatedImages, **options: Any) -> TiledImages:
    settings: dict[str, Any] = {"size": 100, "overlap": 0.0, "visible": 0.3, "keep_empty": False}
    return TiledImages(samples, **settings | options)


def test_tiles_keep_the_boxes_that_they_show(tmp_path: Path) -> None:
    samples = picture(tmp_path)
    whole = tiled(samples, keep_empty=True)
    assert whole.sizes.tolist() == [[100, 100]] * 4  # at (0, 0), (0, 100), (20, 0), (20, 100)
    parts = [whole[row] for row in range(4)]
    assert [part.boxes_xyxy.tolist() for part in parts] == [
        [[10, 10, 40, 30], [90, 50, 100, 70]],
        [[0, 50, 10, 70], [50, 80, 96, 100]],
        [[10, 0, 40, 10], [90, 30, 100, 50]],
        [[0, 30, 10, 50], [50, 60, 96, 98]],
    ]
    assert [part.class_labels.tolist() for part in parts] == [[0, 1], [1, 2], [0, 1], [1, 2]]
    for part in parts:
        assert (part.image_id, part.original_size) == (11, (100, 100))
        for box, label in zip(part.boxes_xyxy.int().tolist(), part.class_labels, strict=True):
            inside = part.image[:, box[1] : box[3], box[0] : box[2]]
            assert inside.unique().tolist() == [SQUARES[int(label)][1]]
    strict = tiled(samples, visible=0.51)
    # the middle square is cut in halves; a little more than half of the lower one is in two tiles
    assert [strict[row].class_labels.tolist() for row in range(len(strict))] == [[0], [2], [2]]
    with pytest.raises(DataError, match=r"no tile shows 1 of a box; lower data\.tile_visible"):
        tiled(samples, size=16, visible=1.0)


def test_recipes_train_on_tiles(tmp_path: Path) -> None:
    samples = picture(tmp_path)
    setting = ["data.train_annotations=x.json", "data.tile_size=100", "data.tile_overlap=0"]
    config = override(Recipe(), setting).data
    assert len(build.training_images(config, samples)) == 4
    assert build.training_images(DataConfig(), samples) is samples
    with pytest.raises(RecipeError, match=r"tile_size cuts images of data\.train_annotations only"):
        override(Recipe(), ["data.tile_size=100"])
    with pytest.raises(RecipeError, match="tile_size must be at least 8 pixels, found 7"):
        override(Recipe(), ["data.train_annotations=x.json", "data.tile_size=7"])
    drawn = ShapesDataset(2, image_size=48)
    assert build.training_images(DataConfig(), drawn) is drawn


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def test_an_object_in_two_tiles_is_one_detection() -> None:
    tiles = windows(100, 180, 100, 0.2)
    assert [tile.left for tile in tiles] == [0, 80]
    left = found([[84, 10, 96, 30], [84, 50, 100, 70], [5, 5, 50, 50]], [0.6, 0.9, 0.5], [0, 0, 1])
    right = found([[4, 10, 16, 30], [4, 50, 30, 70], [4, 50, 30, 69]], [0.7, 0.8, 0.7], [0, 0, 1])
    merged = merge([left, right], tiles, (100, 180), 0.5)
    # the box at the border of the first tile goes, though it scores more than the whole one
    assert merged["boxes"].tolist() == [
        [84, 50, 110, 70],
        [84, 10, 96, 30],
        [84, 50, 110, 69],
        [5, 5, 50, 50],
    ]
    torch.testing.assert_close(merged["scores"], torch.tensor([0.8, 0.7, 0.7, 0.5]))
    assert merged["labels"].tolist() == [0, 0, 1, 1]
    nothing = merge([found([], [], [])] * 2, tiles, (100, 180), 0.5)
    assert nothing["boxes"].shape == (0, 4)


class Bright(nn.Module):
    """Finds the extent of the pixels of each grey of `SQUARES`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(
            class_names=[f"grey {grey}" for _, grey in SQUARES],
            category_ids=[grey for _, grey in SQUARES],
        )
        self.device = torch.device("cpu")

    def forward(self, pixel_values: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.full((1, len(SQUARES), len(SQUARES)), -9.0)
        boxes = torch.full((1, len(SQUARES), 4), 0.5)
        size = torch.tensor(pixel_values.shape[:1:-1])
        for row, (_, grey) in enumerate(SQUARES):
            places = torch.nonzero(pixel_values[0, 0] == grey).flip(1)
            if len(places):
                low, high = places.min(0).values / size, (places.max(0).values + 1) / size
                boxes[0, row] = torch.cat([(low + high) / 2, high - low])
                logits[0, row, row] = 9.0
        return SimpleNamespace(logits=logits * self.weight, pred_boxes=boxes)


def test_predict_maps_tiles_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path)
    seen: list[tuple[int, ...]] = []
    model = Bright()
    model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(tuple(inputs["pixel_values"].shape[-2:])),
        with_kwargs=True,
    )
    processor = DetrelayImageProcessor(
        do_resize=False, do_rescale=False, do_normalize=False, do_pad=False
    )
    monkeypatch.setattr("detrelay.apps.build.load_saved", lambda *_: (model, processor))
    options: dict[str, Any] = {"data": tmp_path / "instances.json", "tiles": 64, "overlap": 0.4}
    assert predict.predict(predict.Arguments(Path("m"), tmp_path / "out", **options)) == 0
    assert set(seen) == {(64, 64)}
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    boxes = {row["category_id"]: row["bbox"] for row in rows}
    assert len(rows) == 3  # each once
    for (x1, y1, x2, y2), grey in SQUARES:
        assert boxes[grey] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
