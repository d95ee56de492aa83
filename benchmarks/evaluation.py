"""Time and memory of scoring detections, by back end.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --images 5000 --detections 300

Each row runs in a separate process, so that its memory is measured separately. "stock" is
pycocotools as it is commonly called, on dictionaries; the others are the back ends of `detrelay
evaluate`.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from detrelay.core.evaluation.backends import BACKENDS
from detrelay.core.evaluation.coco_ap import evaluate_coco
from detrelay.core.evaluation.tables import Detections, GroundTruth

_STOCK = "stock"
_OBJECTS = 7  # the average of a COCO image
_CATEGORIES = 80
_RIGHT = 0.1  # share of detections near an object


@dataclass(frozen=True)
class Arguments:
    """Score synthetic detections of 80 categories."""

    images: int = 2000
    """How many images."""
    detections: int = 100
    """Detections per image."""
    backends: tuple[str, ...] = (_STOCK, *BACKENDS)
    """Which rows to measure."""
    repeats: int = 1
    """Runs per row; the fastest counts."""


def make_case(images: int, detections: int) -> tuple[GroundTruth, Detections]:
    """Objects and detections, a tenth of which lie near an object of their category."""
    generator = np.random.default_rng(0)

    def boxes(count: int) -> Any:
        return np.column_stack(
            [generator.uniform(0, 400, (count, 2)), generator.uniform(10, 200, (count, 2))]
        )

    objects, claims = images * _OBJECTS, images * detections
    truth = GroundTruth(
        image_ids=np.arange(1, images + 1),
        category_ids=np.arange(1, _CATEGORIES + 1),
        names=tuple(f"category {number}" for number in range(_CATEGORIES)),
        image=generator.integers(0, images, objects),
        category=generator.integers(0, _CATEGORIES, objects),
        boxes_xywh=(sides := boxes(objects)),
        areas=sides[:, 2] * sides[:, 3],
        crowd=generator.random(objects) < 0.01,
    )
    image, category = (
        np.repeat(np.arange(images), detections),
        generator.integers(0, _CATEGORIES, claims),
    )
    found = boxes(claims)
    near = generator.permutation(claims)[: round(_RIGHT * claims)]
    source = generator.integers(0, objects, len(near))
    image[near], category[near] = truth.image[source], truth.category[source]
    found[near] = truth.boxes_xywh[source] + generator.normal(0, 5, (len(near), 4))
    found[:, 2:] = found[:, 2:].clip(1)
    return truth, Detections(image + 1, category + 1, found, generator.random(claims))


def stock(truth: GroundTruth, detections: Detections) -> float:
    """AP by pycocotools as commonly called."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(image)} for image in truth.image_ids],
            "categories": [{"id": int(category)} for category in truth.category_ids],
            "annotations": [
                {
                    "id": row + 1,
                    "image_id": int(truth.image_ids[truth.image[row]]),
                    "category_id": int(truth.category_ids[truth.category[row]]),
                    "bbox": truth.boxes_xywh[row].tolist(),
                    "area": float(truth.areas[row]),
                    "iscrowd": int(truth.crowd[row]),
                }
                for row in range(len(truth))
            ],
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(list(detections.rows())), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[0])


def measure(backend: str, images: int, detections: int) -> tuple[float, float, float]:
    """Seconds, peak memory in MiB, AP."""
    truth, found = make_case(images, detections)
    start = time.perf_counter()
    if backend == _STOCK:
        ap = stock(truth, found)
    else:
        ap = evaluate_coco(truth, found, backend=backend).stats["AP"]  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak / (2**20 if sys.platform == "darwin" else 2**10), ap


def main() -> None:
    """Print a row for each back end."""
    arguments = tyro.cli(Arguments)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"{arguments.images} images x {arguments.detections} detections, {os.cpu_count()} cores, "
        f"load before: {load}"
    )
    print(f"{'':14}{'seconds':>9}{'times as fast':>15}{'peak MiB':>10}{'AP':>20}")
    slowest = None
    for backend in arguments.backends:
        runs = []
        for _ in range(arguments.repeats):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                future = pool.submit(measure, backend, arguments.images, arguments.detections)
                runs.append(future.result())
        seconds, peak, ap = min(runs)
        slowest = seconds if slowest is None else slowest
        print(f"{backend:14}{seconds:9.2f}{slowest / seconds:15.1f}{peak:10.0f}{ap:20.16f}")


if __name__ == "__main__":
    main()
