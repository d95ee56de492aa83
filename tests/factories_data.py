"""Small datasets generated on the fly."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.coco import AnnotatedImages, Sample
from detrelay.core.data.places import open_place
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.errors import DataError

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
    """A COCO file that a test may corrupt."""
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


def write_imagefolder(folder: Path, samples: AnnotatedImages) -> None:
    """The same images and boxes with `metadata.jsonl`, by names of categories."""
    folder.mkdir()
    truth = samples.ground_truth
    names = {category["id"]: category["name"] for category in truth["categories"]}
    own: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for entry in truth["annotations"]:
        own[entry["image_id"]].append(entry)
    lines = []
    for row, image in enumerate(truth["images"]):
        boxes = own[image["id"]]
        objects = {
            "bbox": [entry["bbox"] for entry in boxes],
            "category": [names[entry["category_id"]] for entry in boxes],
            "iscrowd": [entry["iscrowd"] for entry in boxes],
        }
        file = samples.annotations.images.open(row)
        assert isinstance(file, Path)
        name = f"{row:03d}{file.suffix}"  # a name such as train_0.png would say its split
        shutil.copy(file, folder / name)
        lines.append(json.dumps({"file_name": name, "image_id": image["id"], "objects": objects}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_coco(folder: Path, content: Any = None, *, images: bool = True) -> Path:
    """Write a COCO json and, in the folder `images` next to it, its images."""
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


def write_toml(folder: Path, text: str) -> Path:
    """A recipe in a file."""
    path = folder / "my.toml"
    path.write_text(text)
    return path


def marked_sample() -> Sample:
    """A black image with two bright boxes, so that pixels tell where boxes are."""
    sample = make_sample(100, 140, [[20, 30, 60, 80], [90, 10, 130, 50]])
    image = torch.zeros_like(sample.image)
    for left, top, right, bottom in sample.boxes_xyxy.int().tolist():
        image[:, top:bottom, left:right] = 255
    return Sample(image, sample.boxes_xyxy, sample.class_labels, 7, (100, 140))


def assert_boxes_lie_on_bright_pixels(result: Sample, slack: int) -> None:
    """Of a `marked_sample`, but for so many pixels."""
    height, width = result.image.shape[-2:]
    expected = torch.zeros(height, width)
    for left, top, right, bottom in result.boxes_xyxy.round().int().tolist():
        assert 0 <= left <= right <= width
        assert 0 <= top <= bottom <= height
        expected[top:bottom, left:right] = 1
    bright = (result.image[0] > 127).float()
    assert (bright - expected).abs().sum() <= slack


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    """The message of an error, which holds no line break."""
    message = str(error.value)
    assert "\n" not in message
    return message


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


def assert_same_batches(
    found: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]
) -> None:
    """Fail unless all batches have the same pixels, image ids and boxes."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        for first, second in zip(one["labels"], other["labels"], strict=True):
            assert torch.equal(first["image_id"], second["image_id"])
            assert torch.equal(first["boxes"], second["boxes"])
