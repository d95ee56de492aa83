"""Time and memory of a report beyond inference: analyses and page, on a made-up recording.

python benchmarks/report.py
python benchmarks/report.py --images 5000 --queries 300
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from detrelay.apps.evaluate import write_json
from detrelay.apps.report import write_report
from detrelay.apps.report_figures import analyse
from detrelay.core.data.coco import CocoDataset
from detrelay.core.engine.memory import peak_memory_mib
from detrelay.core.evaluation.cascade import Cascade, Labels, StageSimilarity
from detrelay.core.evaluation.query_features import QueryFeatures
from detrelay.core.evaluation.recording import Recording
from detrelay.core.evaluation.tables import Detections, GroundTruth
from detrelay.heads.stageinteractor.gates import FilterGate

_OBJECTS = 7  # as many as an image of COCO has
_CATEGORIES = 80
_BATCH = 4
_WIDTH, _HEIGHT = 640, 480


@dataclass(frozen=True)
class Arguments:
    """Analyse a recording of noise around made-up objects, and write its page."""

    images: int = 2000
    """How many images."""
    queries: int = 100
    """Queries of each image."""
    stages: int = 6
    """Decoder stages."""
    channels: int = 256
    """Width of the query features."""
    detections: int = 100
    """Detections of each image."""
    backend: Literal["pycocotools", "hotcoco"] = "hotcoco"
    """Who computes AP."""


class Clock:
    """Prints how long each step took, and the most memory so far."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def tell(self, step: str, *, since_start: bool = False) -> None:
        """The time since the last call, or since the beginning."""
        now = time.perf_counter()
        seconds = now - (self.start if since_start else self.last)
        self.last = now
        peak = peak_memory_mib(torch.device("cpu"))
        print(f"{step:34}{seconds:8.1f} s {peak:8.0f} MiB", flush=True)


def objects_of(arguments: Arguments, generator: np.random.Generator) -> Any:
    """Boxes xywh [I, 7, 4] inside the image, and their categories [I, 7]."""
    shape = (arguments.images, _OBJECTS)
    sizes = generator.uniform(20, 200, (*shape, 2))
    corners = generator.uniform(0, 1, (*shape, 2)) * (np.array([_WIDTH, _HEIGHT]) - sizes)
    return np.concatenate([corners, sizes], axis=-1), generator.integers(_CATEGORIES, size=shape)


def dataset_of(folder: Path, boxes: Any, categories: Any) -> CocoDataset:
    """The objects as a COCO file; all images are one grey picture."""
    Image.new("RGB", (_WIDTH, _HEIGHT), "grey").save(folder / "grey.png")
    file = folder / "val.json"
    images = range(1, len(boxes) + 1)
    write_json(
        file,
        {
            "images": [
                {"id": image, "file_name": "grey.png", "width": _WIDTH, "height": _HEIGHT}
                for image in images
            ],
            "annotations": [
                {
                    "id": (image - 1) * _OBJECTS + row + 1,
                    "image_id": image,
                    "category_id": int(categories[image - 1, row]) + 1,
                    "bbox": boxes[image - 1, row].tolist(),
                    "iscrowd": 0,
                }
                for image in images
                for row in range(_OBJECTS)
            ],
            "categories": [
                {"id": number, "name": f"class {number}"} for number in range(1, _CATEGORIES + 1)
            ],
        },
    )
    return CocoDataset(file)


def features_of(
    arguments: Arguments, categories: Any, generator: np.random.Generator
) -> tuple[StageSimilarity, Any]:
    """Noise around a mean for each category, which grows from stage to stage, batch by batch."""
    stages, images, channels = arguments.stages, arguments.images, arguments.channels
    means = generator.normal(size=(_CATEGORIES, channels)).astype(np.float32)
    growth = np.arange(stages, dtype=np.float32)[:, None, None, None] / 4
    similarity, kept = StageSimilarity(), []
    for start in range(0, images, _BATCH):
        classes = categories[start : start + _BATCH]
        shape = (stages, len(classes), min(100, arguments.queries), channels)
        hidden = generator.standard_normal(shape, dtype=np.float32)
        hidden[:, :, :_OBJECTS] += growth * means[classes]
        similarity.add(list(hidden.reshape(stages, -1, channels).astype(np.float64)))
        kept.append(hidden[:, :, :_OBJECTS].reshape(stages, -1, channels))
    return similarity, np.concatenate(kept, axis=1)


def recording_of(
    arguments: Arguments, boxes: Any, categories: Any, generator: np.random.Generator
) -> Recording:
    """Stages that come nearer to the objects; the first queries are theirs."""
    stages, images, queries = arguments.stages, arguments.images, arguments.queries
    count = images * _OBJECTS
    image = np.repeat(np.arange(images), _OBJECTS)
    query = np.tile(np.arange(_OBJECTS), images)
    all_boxes = generator.uniform(10, 200, (stages, images, queries, 4)).astype(np.float32)
    labels = Labels(np.arange(count), query)
    similarity, features = features_of(arguments, categories, generator)
    detections = []
    for stage in range(stages):
        noise = generator.normal(size=boxes.shape) * 40 / (stage + 1)
        all_boxes[stage, :, :_OBJECTS] = (boxes + noise).clip(1)
        rows = generator.integers(queries, size=(images, arguments.detections))
        rows[:, :_OBJECTS] = np.arange(_OBJECTS)
        claimed = generator.integers(_CATEGORIES, size=rows.shape)
        claimed[:, :_OBJECTS] = categories
        detections.append(
            Detections(
                np.repeat(np.arange(1, images + 1), arguments.detections),
                claimed.ravel() + 1,
                all_boxes[stage, np.arange(images)[:, None], rows].reshape(-1, 4).astype(float),
                generator.random(rows.size),
            )
        )
    return Recording(
        image_ids=np.arange(1, images + 1),
        seen=np.arange(images),
        detections=tuple(detections),
        cascade=Cascade(
            image=image,
            category=categories.ravel(),
            target_boxes=boxes.reshape(-1, 4),
            image_sizes=np.tile([float(_WIDTH), float(_HEIGHT)], (images, 1)),
            boxes=all_boxes,
            own=(labels,) * stages,
            learned=(labels,) * stages,
        ),
        similarity=similarity,
        features=QueryFeatures(features, categories.ravel(), image),
    )


def main(arguments: Arguments) -> None:
    """Print the time of each step."""
    generator = np.random.default_rng(0)
    boxes, categories = objects_of(arguments, generator)
    clock = Clock()
    recording = recording_of(arguments, boxes, categories, generator)
    clock.tell("made up, similarity gathered")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        samples = dataset_of(folder, boxes, categories)
        truth = GroundTruth.from_coco(samples.ground_truth)
        found = [truth.place(part) for part in recording.detections]
        gate = FilterGate(2, 1, "channel", [torch.rand(arguments.images * arguments.queries)])
        clock.tell("read")
        clock.start = clock.last
        figures = analyse(
            truth,
            found,
            recording,
            [gate],
            max_detections=100,
            backend=arguments.backend,
            gallery=4,
        )
        clock.tell("all figures")
        about = {"model": "made up", "assigner": "none", "score_threshold": 0.3, "nms_iou": 0.7}
        names = list(truth.names)
        figures |= {"about": about, "beside": None, "categories": names}
        page = write_report(figures, samples, truth, found, folder)
        clock.tell(f"page of {page.stat().st_size / 2**20:.1f} MiB")
        clock.tell("report beyond inference", since_start=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
