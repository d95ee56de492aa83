"""COCO average precision and recall of boxes, computed by pycocotools."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from detrelay.core.errors import DataError

_LIMITS = (1, 10, 100)
_IOU_50, _IOU_75 = 0, 5
_AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, slots=True)
class CocoResult:
    """The figures of one evaluation, as fractions; -1 where there is no object to find.

    Attributes:
        stats: the twelve figures of COCO by name: AP over IoU 0.50:0.95, AP50, AP75, AP by area
            of the object (small below 32 x 32 pixels, large above 96 x 96), AR_1, AR_10 and
            AR_100 by number of detections, AR by area. AR_300, say, where more were asked for.
        per_category: AP by category name.
        max_detections: most detections of a category in an image that were looked at.
    """

    stats: dict[str, float]
    per_category: dict[str, float]
    max_detections: int

    def to_dict(self) -> dict[str, Any]:
        """The result as plain numbers, for json."""
        return {
            "stats": dict(self.stats),
            "AP_per_category": dict(self.per_category),
            "max_detections": self.max_detections,
        }

    def table(self) -> str:
        """The result as text, percent; categories without objects show a dash."""
        width = max(map(len, [*self.stats, *self.per_category]))
        lines = [f"{name:<{width}}  {_percent(value)}" for name, value in self.stats.items()]
        lines += ["", f"{'AP by category':<{width}}"]
        lines += [
            f"{name:<{width}}  {_percent(value)}" for name, value in self.per_category.items()
        ]
        return "\n".join(lines)


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    max_detections: int = 100,
) -> CocoResult:
    """Score detections against a COCO ground truth.

    Detections of equal score rank by their order. The limit on detections counts, as in
    pycocotools, those of one category in one image. With a limit above 100, AP, AP by category
    and AR_1, AR_10, AR_100 stay as they are; AP50, AP75 and all figures by area look at
    `max_detections`, and AR_<max_detections> is added. These are the figures that the stock
    evaluator prints when its three limits are raised to (100, 300, 1000), as done for published
    detectors with 300 queries.

    Args:
        ground_truth: `images`, `annotations` (crowds marked by `iscrowd`) and `categories`.
        detections: rows with `image_id`, `category_id`, `bbox` [x, y, width, height] in pixels
            and `score`.
        max_detections: most detections of a category in an image that are looked at.

    Raises:
        DataError: a detection names an unknown image or category or holds a number that is not
            finite, or two categories share a name.
        ValueError: `max_detections` is below 1.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, found {max_detections}")
    names = {category["id"]: str(category["name"]) for category in ground_truth["categories"]}
    if len(set(names.values())) < len(names):
        raise DataError("two categories of the ground truth share a name; names must differ")
    _check_detections(detections, {image["id"] for image in ground_truth["images"]}, set(names))
    recall_limits = sorted({*_LIMITS, max(_LIMITS[-1], max_detections)})
    limits = sorted({min(limit, max_detections) for limit in recall_limits})
    evaluator = _run(ground_truth, detections, limits)
    precision = evaluator.eval["precision"]  # [IoU, recall, category, area, limit]
    recall = evaluator.eval["recall"]  # [IoU, category, area, limit]
    at_100 = limits.index(min(100, max_detections))
    stats = {
        "AP": _mean(precision[..., 0, at_100]),
        "AP50": _mean(precision[_IOU_50, ..., 0, -1]),
        "AP75": _mean(precision[_IOU_75, ..., 0, -1]),
    }
    for area, label in enumerate(_AREAS[1:], start=1):
        stats[f"AP_{label}"] = _mean(precision[..., area, -1])
    for limit in recall_limits:
        column = limits.index(min(limit, max_detections))
        stats[f"AR_{limit}"] = _mean(recall[..., 0, column])
    for area, label in enumerate(_AREAS[1:], start=1):
        stats[f"AR_{label}"] = _mean(recall[..., area, -1])
    per_category = {
        names[category]: _mean(precision[:, :, row, 0, at_100])
        for row, category in enumerate(evaluator.params.catIds)
    }
    return CocoResult(stats, per_category, max_detections)


def detections_from_results(
    results: Iterable[Mapping[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows in COCO's results format from post-processed outputs.

    Args:
        results: one mapping an image with `scores` [n], `labels` [n] and `boxes` [n, 4] xyxy in
            pixels of the original image.
        image_ids: original image id of each result.
        category_ids: original category id by class index.

    Raises:
        DataError: a label has no category.
    """
    rows = []
    for result, image_id in zip(results, image_ids, strict=True):
        low, high = result["boxes"].reshape(-1, 2, 2).unbind(1)
        boxes = torch.cat([low, high - low], dim=1).tolist()
        scores, labels = result["scores"].tolist(), result["labels"].tolist()
        if labels and max(labels) >= len(category_ids):
            raise DataError(
                f"the model found class index {max(labels)} in image {image_id}, but the data set "
                f"has {len(category_ids)} categories (indices from 0)"
            )
        for score, label, box in zip(scores, labels, boxes, strict=True):
            rows.append(
                {
                    "image_id": int(image_id),
                    "category_id": int(category_ids[label]),
                    "bbox": box,
                    "score": score,
                }
            )
    return rows


def _run(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], limits: list[int]
) -> COCOeval:
    """Let pycocotools match and accumulate, without its printing."""
    with redirect_stdout(io.StringIO()):
        evaluator = COCOeval(
            _index(ground_truth, _truth_rows(ground_truth["annotations"])),
            _index(ground_truth, _detection_rows(detections)),
            iouType="bbox",
        )
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _check_detections(
    detections: Sequence[Mapping[str, Any]], images: set[int], categories: set[int]
) -> None:
    for row, entry in enumerate(detections):
        for key in ("image_id", "category_id", "bbox", "score"):
            if key not in entry:
                raise DataError(f"detection {row} has no {key!r}")
        for key, known in (("image_id", images), ("category_id", categories)):
            if entry[key] not in known:
                raise DataError(
                    f"detection {row} names {key} {entry[key]!r}, which the ground truth does "
                    f"not list"
                )
        box = entry["bbox"]
        if not (
            isinstance(box, list | tuple)
            and len(box) == 4
            and all(map(_is_finite, box))
            and box[2] >= 0
            and box[3] >= 0
        ):
            raise DataError(
                f"bbox of detection {row} must be four finite numbers [x, y, width, height] "
                f"with width and height of at least 0, found {box!r}"
            )
        if not _is_finite(entry["score"]):
            raise DataError(
                f"score of detection {row} must be a finite number, found {entry['score']!r}"
            )


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _truth_rows(annotations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies that pycocotools may mark.

    Ids are given anew from 1: pycocotools takes a match with annotation id 0 for no match.
    """
    return [
        {
            "id": number,
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "area": entry.get("area", entry["bbox"][2] * entry["bbox"][3]),
            "iscrowd": entry.get("iscrowd", 0),
        }
        for number, entry in enumerate(annotations, start=1)
    ]


def _detection_rows(detections: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": list(entry["bbox"]),
            "area": entry["bbox"][2] * entry["bbox"][3],
            "iscrowd": 0,
            "score": entry["score"],
        }
        for number, entry in enumerate(detections, start=1)
    ]


def _index(ground_truth: Mapping[str, Any], rows: list[dict[str, Any]]) -> COCO:
    """What pycocotools works on; unlike its own loader this takes an empty list of rows."""
    coco = COCO()
    coco.dataset = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": rows,
    }
    coco.createIndex()
    return coco


def _mean(values: NDArray[np.float64]) -> float:
    """Mean over what can be measured (-1 marks what cannot), or -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else -1.0


def _percent(value: float) -> str:
    return f"{100 * value:5.1f}" if value >= 0 else "    -"
