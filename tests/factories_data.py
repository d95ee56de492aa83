"""Small data sets made on the spot."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from detrelay.core.data.coco import Sample
from detrelay.core.data.shapes import ShapesDataset

# Category ids with a gap and out of order, a crowd, an image without objects.
COCO: dict[str, Any] = {
    "images": [
        {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 5, "file_name": "b.png", "width": 24, "height": 32},
        {"id": 8, "file_name": "c.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 90, "bbox": [2, 3, 10, 20], "area": 150.5},
        {"id": 2, "image_id": 11, "category_id": 3, "bbox": [0.5, 1.25, 8, 6], "iscrowd": 0},
        {
            "id": 4,
            "image_id": 11,
            "category_id": 3,
            "bbox": [0, 0, 30, 20],
            "area": 400,
            "iscrowd": 1,
            "segmentation": {"size": [30, 40], "counts": [0, 1200]},
        },
        {"id": 3, "image_id": 11, "category_id": 90, "bbox": [30, 20, 10, 10], "iscrowd": 0},
    ],
    "categories": [{"id": 90, "name": "door"}, {"id": 3, "name": "wheel"}],
}


def coco_content() -> dict[str, Any]:
    """A COCO file that a test may spoil."""
    return copy.deepcopy(COCO)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of smooth noise."""
    values = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def write_shapes(folder: Path, category_ids: Sequence[int] = (1, 2, 3, 4)) -> None:
    """Write train.json and val.json of drawn shapes, and their images in `images`."""
    (folder / "images").mkdir(parents=True)
    for split, seed, count in (("train", 5, 8), ("val", 6, 3)):
        shapes = ShapesDataset(count, image_size=64, seed=seed)
        truth = copy.deepcopy(shapes.ground_truth)
        for category in truth["categories"]:
            category["id"] = category_ids[category["id"] - 1]
        for annotation in truth["annotations"]:
            annotation["category_id"] = category_ids[annotation["category_id"] - 1]
        for index, entry in enumerate(truth["images"]):
            entry["file_name"] = f"{split}_{index}.png"
            image = to_pil_image(shapes[index].image)
            image.save(folder / "images" / entry["file_name"])
        (folder / f"{split}.json").write_text(json.dumps(truth))


def write_coco(folder: Path, content: Any = None, *, images: bool = True) -> Path:
    """Write a COCO json and, in the folder `images` beside it, its images."""
    content = coco_content() if content is None else content
    if images:
        (folder / "images").mkdir(exist_ok=True)
        for entry in content["images"]:
            image = noise_image(entry["width"], entry["height"], entry["id"])
            image.save(folder / "images" / entry["file_name"])
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def make_sample(
    height: int = 60, width: int = 80, boxes: list[list[float]] | None = None, seed: int = 0
) -> Sample:
    """A sample of smooth noise; classes count up from 0."""
    boxes = [[10.0, 20.0, 30.0, 50.0], [40.0, 5.0, 79.0, 45.0]] if boxes is None else boxes
    pixels = torch.from_numpy(np.array(noise_image(width, height, seed))).permute(2, 0, 1)
    return Sample(
        image=pixels.contiguous(),
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        class_labels=torch.arange(len(boxes)),
        image_id=7,
        original_size=(height, width),
    )
