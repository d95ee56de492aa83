"""Ground truths and detections to score, as COCO rows."""

from __future__ import annotations

from typing import Any

import numpy as np

Row = dict[str, Any]


def truth(boxes: list[Row], num_images: int = 1) -> dict[str, Any]:
    """A ground truth with categories 4 (cat) and 9 (dog); boxes default to image 1 and cat."""
    annotations = []
    for number, row in enumerate(boxes, start=1):
        area = row["bbox"][2] * row["bbox"][3]
        defaults = {"id": number, "image_id": 1, "category_id": 4, "area": area, "iscrowd": 0}
        annotations.append(defaults | row)
    return {
        "images": [
            {"id": number, "width": 640, "height": 480} for number in range(1, num_images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def found(score: float, box: list[float], category: int = 4, image: int = 1) -> Row:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def random_case() -> tuple[dict[str, Any], list[Row]]:
    """Six images with crowds, misses, doubles and, in one image, over 300 detections."""
    generator = np.random.default_rng(0)
    boxes: list[Row] = []
    detections: list[Row] = []
    for image in range(1, 7):
        for _ in range(10):
            side = np.exp(generator.uniform(2.5, 5.2))
            box = [*generator.uniform(0, 300, 2), side, side * generator.uniform(0.6, 1.4)]
            category = int(generator.choice([4, 9]))
            boxes.append(
                {
                    "bbox": [float(value) for value in box],
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": int(generator.random() < 0.1),
                }
            )
            for _ in range(generator.integers(0, 3)):
                moved = np.array(box) + generator.normal(0, 0.08, 4) * box[2]
                moved[2:] = moved[2:].clip(1)
                score = round(float(generator.random()), 2)
                detections.append(found(score, moved.tolist(), category, image))
    for _ in range(350):
        noise = generator.uniform(1, 200, 4).tolist()
        detections.append(found(round(float(generator.random()), 2), noise, 4, 2))
    return truth(boxes, num_images=6), detections
