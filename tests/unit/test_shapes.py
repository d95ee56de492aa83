"""The drawn dataset: pixels and boxes agree, and seeds determine everything."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from detrelay.core.data import shapes
from detrelay.core.data.shapes import SHAPES, ShapesDataset


def extent_of_drawing(shape: shapes.ShapeObject, height: int, width: int) -> np.ndarray:
    """Draw one shape alone and read its box from the touched pixels of the larger canvas."""
    scale = shapes._SUPERSAMPLING
    canvas = Image.new("RGB", (width * scale, height * scale))
    shapes._paint(canvas, ImageDraw.Draw(canvas), shape, np.array([255.0, 255.0, 255.0]))
    rows, columns = np.nonzero(np.asarray(canvas)[..., 0])
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale


def test_boxes_are_the_extent_of_the_drawn_shapes() -> None:
    data = ShapesDataset(60, image_size=160, seed=3)
    seen = Counter[int]()
    for index in range(len(data)):
        _, scene = data._scene(index)
        for shape in scene.objects:
            drawn = extent_of_drawing(shape, scene.height, scene.width)
            # half a pixel: Pillow fills every pixel of the larger canvas that an edge touches
            assert np.abs(drawn - shape.box_xyxy).max() <= 0.51, (index, SHAPES[shape.label])
            seen[shape.label] += 1
    assert set(seen) == set(range(len(SHAPES)))


def test_shapes_show_in_the_image() -> None:
    data = ShapesDataset(30, seed=1)
    for index in range(len(data)):
        generator, scene = data._scene(index)
        state = generator.bit_generator.state
        bare = shapes._draw(replace(scene, objects=()), generator)
        generator.bit_generator.state = state
        full = shapes._draw(scene, generator)
        if not scene.objects:
            continue
        for shape in scene.objects[-1:]:  # nothing covers the last one
            left, top, right, bottom = (round(edge) for edge in shape.box_xyxy)
            window = np.s_[top:bottom, left:right]
            change = np.abs(full[window].astype(int) - bare[window]).max(-1)
            assert (change > 40).mean() > 0.2, (index, SHAPES[shape.label])


def test_samples_and_ground_truth_say_the_same() -> None:
    data = ShapesDataset(40, image_size=96, seed=5)
    truth = data.ground_truth
    for index in range(len(data)):
        sample = data[index]
        entry = truth["images"][index]
        assert sample.image.shape == (3, entry["height"], entry["width"])
        assert sample.image.dtype == torch.uint8
        assert sample.original_size == (entry["height"], entry["width"])
        assert sample.image_id == entry["id"] == data.image_ids[index]
        rows = [row for row in truth["annotations"] if row["image_id"] == entry["id"]]
        boxes = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(sample.boxes_xyxy, boxes, atol=1e-4, rtol=0)
        ids = [data.categories[label].id for label in sample.class_labels.tolist()]
        assert ids == [row["category_id"] for row in rows]
    assert data.report.boxes == len(truth["annotations"])
    assert len({row["id"] for row in truth["annotations"]}) == len(truth["annotations"])


def test_images_vary_as_promised() -> None:
    data = ShapesDataset(300, image_size=160, seed=0)
    scenes = [data._scene(index)[1] for index in range(len(data))]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == set(range(5))
    assert counts[0] == data.report.images_without_boxes
    assert 0.03 < counts[0] / len(data) < 0.15
    for scene in scenes:
        assert 120 <= scene.height <= 160
        assert 120 <= scene.width <= 160
        short = min(scene.height, scene.width)
        hidden = [0.0] * len(scene.objects)
        for place, shape in enumerate(scene.objects):
            left, top, right, bottom = shape.box_xyxy
            assert min(left, top) >= -1e-6
            assert right <= scene.width + 1e-6
            assert bottom <= scene.height + 1e-6
            assert max(right - left, bottom - top) <= 0.6 * short + 1e-6
            for earlier in range(place):
                x1, y1, x2, y2 = scene.objects[earlier].box_xyxy
                overlap = max(0, min(x2, right) - max(x1, left)) * max(
                    0, min(y2, bottom) - max(y1, top)
                )
                hidden[earlier] += overlap / ((x2 - x1) * (y2 - y1))
        assert all(share <= 0.5 + 1e-6 for share in hidden)
    assert len({(scene.height, scene.width) for scene in scenes}) > 100


def test_an_image_follows_from_seed_and_index_alone() -> None:
    first = ShapesDataset(5, seed=2)
    again = ShapesDataset(50, seed=2)
    late = again[4]
    assert torch.equal(first[4].image, late.image)
    assert torch.equal(first[4].boxes_xyxy, late.boxes_xyxy)
    torch.manual_seed(1)
    assert torch.equal(first[4].image, late.image)


def test_splits_share_no_image() -> None:
    images = [
        ShapesDataset(30, image_size=64, seed=seed)[index].image.numpy().tobytes()
        for seed in range(3)
        for index in range(30)
    ]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_images": 0}, "num_images"),
        ({"num_images": 3, "image_size": 8}, "image_size"),
        ({"num_images": 3, "seed": -1}, "seed"),
    ],
)
def test_impossible_numbers_are_refused(arguments: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ShapesDataset(**arguments)


def test_iterating_ends() -> None:
    assert len(list(ShapesDataset(3, image_size=48))) == 3
