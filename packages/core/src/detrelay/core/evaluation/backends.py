"""Matching and accumulation: pycocotools, the reference, or a faster library with equal figures.

Both get positions instead of ids, at most as many detections per category and image as the largest
limit, and areas as given in the data.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detrelay.core.evaluation.tables import Floats, Found, GroundTruth

AREAS = ("all", "small", "medium", "large")
IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS: Floats = np.linspace(0.0, 1.0, 101)

BackendName = Literal["pycocotools", "hotcoco"]


@dataclass(frozen=True, slots=True, eq=False)
class Accumulated:
    """Precision and recall before averaging; -1 if there is no object to find.

    Attributes:
        precision: float64 [10 IoU thresholds, 101 recalls, K, 4 areas, limits].
        recall: float64 [10 IoU thresholds, K, 4 areas, limits].
        limits: maximum detections per category and image, ascending.
    """

    precision: Floats
    recall: Floats
    limits: tuple[int, ...]


def accumulate(
    truth: GroundTruth, found: Found, limits: Sequence[int], backend: BackendName = "pycocotools"
) -> Accumulated:
    """Match detections to objects and compute precision and recall.

    Args:
        truth: the objects.
        found: the detections.
        limits: maximum detections per category and image, ascending.
        backend: a key of `BACKENDS`.

    Raises:
        ValueError: the back end is unknown or not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown back end {backend!r}; known are {', '.join(BACKENDS)}")
    precision, recall = BACKENDS[backend](truth, found.ranked(limits[-1]), list(limits))
    return Accumulated(precision, recall, tuple(limits))


def fastest_backend() -> BackendName:
    """The fastest back end that is installed."""
    return "pycocotools" if importlib.util.find_spec("hotcoco") is None else "hotcoco"


def _by_pycocotools(truth: GroundTruth, found: Found, limits: list[int]) -> tuple[Floats, Floats]:
    """One category at a time, so that few rows exist at once; categories are independent."""
    shape = (len(IOU_THRESHOLDS), len(truth.names), len(AREAS), len(limits))
    recall = np.full(shape, -1.0)
    precision = np.full((shape[0], len(RECALL_THRESHOLDS), *shape[1:]), -1.0)
    for category in range(len(truth.names)):
        objects = np.flatnonzero(truth.category == category)
        claims = np.flatnonzero(found.category == category)
        images = np.union1d(truth.image[objects], found.image[claims])
        if not len(images):
            continue
        evaluator = COCOeval(
            # ids from 1: pycocotools treats a match with annotation id 0 as no match
            _index(
                images, [_truth_row(truth, row, id) for id, row in enumerate(objects.tolist(), 1)]
            ),
            _index(
                images, [_found_row(found, row, id) for id, row in enumerate(claims.tolist(), 1)]
            ),
            iouType="bbox",
        )
        evaluator.params.imgIds = images.tolist()
        evaluator.params.catIds = [category]
        evaluator.params.maxDets = limits
        with redirect_stdout(io.StringIO()):
            evaluator.evaluate()
            evaluator.accumulate()
        precision[:, :, category] = evaluator.eval["precision"][:, :, 0]
        recall[:, category] = evaluator.eval["recall"][:, 0]
    return precision, recall


def _index(images: Any, rows: list[dict[str, Any]]) -> COCO:
    """A pycocotools index; unlike its own loader this accepts an empty list of rows."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in images.tolist()],
        "categories": [],
        "annotations": rows,
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _truth_row(truth: GroundTruth, row: int, id: int) -> dict[str, Any]:
    return {
        "id": id,
        "image_id": int(truth.image[row]),
        "category_id": int(truth.category[row]),
        "bbox": truth.boxes_xywh[row].tolist(),
        "area": float(truth.areas[row]),
        "iscrowd": int(truth.crowd[row]),
    }


def _found_row(found: Found, row: int, id: int) -> dict[str, Any]:
    box = found.boxes_xywh[row].tolist()
    return {
        "id": id,
        "image_id": int(found.image[row]),
        "category_id": int(found.category[row]),
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "score": float(found.scores[row]),
    }


def _by_hotcoco(truth: GroundTruth, found: Found, limits: list[int]) -> tuple[Floats, Floats]:
    """The Rust library, fed with columns."""
    try:
        hotcoco: Any = importlib.import_module("hotcoco")
    except ModuleNotFoundError as error:
        raise ValueError(
            "back end hotcoco is not installed; pip install 'detrelay[fast]', or choose pycocotools"
        ) from error
    images = [{"id": row, "width": 0, "height": 0} for row in range(1, len(truth.image_ids) + 1)]
    categories = [{"id": row, "name": name} for row, name in enumerate(truth.names, 1)]
    truth_index = hotcoco.COCO.from_arrays(
        images,
        categories,
        truth.image + 1,
        truth.category + 1,
        truth.boxes_xywh,
        ids=np.arange(1, len(truth) + 1),
        area=truth.areas,
        iscrowd=truth.crowd.astype(np.int64),
    )
    claimed = hotcoco.COCO.from_arrays(
        images, categories, np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4))
    )
    if len(found):
        columns = (found.image + 1, found.boxes_xywh, found.scores, found.category + 1)
        claimed = truth_index.load_res(np.column_stack(columns))
    evaluator = hotcoco.COCOeval(truth_index, claimed, "bbox")
    evaluator.params.max_dets = limits
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


BACKENDS: dict[str, Callable[[GroundTruth, Found, list[int]], tuple[Floats, Floats]]] = {
    "pycocotools": _by_pycocotools,
    "hotcoco": _by_hotcoco,
}
