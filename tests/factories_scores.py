"""Ground truths and detections to score, as COCO rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from detrelay.core.evaluation.tables import Detections, Found, GroundTruth

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


def random_lvis_case() -> tuple[dict[str, Any], list[Row]]:
    """Eight images, six categories of three frequencies, some checked and some not.

    Two images have more than 20 detections; some detections and one object have no area.
    """
    generator = np.random.default_rng(1)
    boxes: list[Row] = []
    detections: list[Row] = []
    images: list[Row] = []
    for image in range(1, 9):
        present = generator.choice(np.arange(1, 7), size=3, replace=False).tolist()
        others = [category for category in range(1, 7) if category not in present]
        images.append(
            {
                "id": image, "width": 640, "height": 480,
                "neg_category_ids": others[:1],
                "not_exhaustive_category_ids": [*present[:1], *others[:1]][: image % 3],
            }
        )  # fmt: skip
        for category in present:
            for _ in range(generator.integers(1, 4)):
                side = float(np.exp(generator.uniform(2.5, 5.2)))
                box = [*generator.uniform(0, 300, 2).tolist(), side, side]
                boxes.append({"bbox": box, "image_id": image, "category_id": category})
                for _ in range(generator.integers(0, 3)):
                    moved = np.array(box) + generator.normal(0, 0.06, 4) * side
                    score = float(generator.random())
                    detections.append(found(score, moved.clip(1).tolist(), category, image))
        for category in (1, 2, 3, 4, 5, 6) * (3 if image in (2, 5) else 1):
            noise = generator.uniform(1, 200, 4).tolist()
            noise[2] *= image != 3
            detections.append(found(float(generator.random()), noise, category, image))
    boxes.append({"bbox": [5.0, 5.0, 0.0, 9.0], "image_id": 8, "category_id": 6})
    case = truth(boxes)
    case["images"] = images
    case["categories"] = [
        {"id": number, "name": f"class {number}", "frequency": "rcf"[number % 3]}
        for number in range(1, 7)
    ]
    return case, detections


def placed(ground_truth: dict[str, Any], rows: list[Row]) -> tuple[GroundTruth, Found]:
    """Ground truth, and detections placed in it."""
    objects = GroundTruth.from_coco(ground_truth)
    return objects, objects.place(Detections.from_rows(rows))


CAT, DOG, OTHER_CAT = [0, 0, 20, 20], [100, 100, 50, 50], [300, 300, 40, 40]
PETS_TRUTH = truth(
    [
        {"bbox": CAT},
        {"bbox": DOG, "category_id": 9},
        {"bbox": OTHER_CAT},
        {"bbox": [200, 0, 10, 10]},  # nobody finds it
        {"bbox": [400, 0, 60, 60], "iscrowd": 1},
    ]
)
# a right one, and each kind of error
PETS_FOUND = [
    found(0.95, CAT),
    found(0.85, DOG),  # a dog taken for a cat
    found(0.75, [0, 0, 20, 18]),  # the first cat again
    found(0.65, [300, 300, 40, 16]),  # the second cat at IoU 0.4
    found(0.55, [500, 300, 9, 9], category=9),  # nothing there
    found(0.45, [410, 10, 20, 20]),  # in the crowd
    found(0.35, [100, 100, 50, 16], category=4),  # a dog at IoU 0.32 taken for a cat
]
SMALL, MEDIUM = [0, 0, 20, 20], [100, 100, 50, 50]
HAND_TRUTH = truth([{"bbox": SMALL}, {"bbox": MEDIUM}])
HAND_FOUND = [
    found(0.9, [0, 0, 20, 20]),
    found(0.8, [300, 300, 30, 30]),  # nothing there
    found(0.7, [100, 100, 50, 36]),  # IoU 0.72: counts at 5 of the 10 thresholds
]
