"""Data sets that exported detectors are measured and calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detrelay.apps import evaluate
from detrelay.core.evaluation.coco_ap import evaluate_coco
from detrelay.core.evaluation.matching import match
from detrelay.core.evaluation.resampling import image_weights, resampled_ap
from detrelay.core.evaluation.tables import Detections, GroundTruth
from detrelay.core.export.quantization import Calibration
from detrelay.core.export.report import Precision

if TYPE_CHECKING:
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.model import DetectorForObjectDetection
    from detrelay.core.export.detector import ExportedDetector
    from detrelay.core.export.folder import Measure

MAX_DETECTIONS = 100
_DRAWS = 1000


@dataclass(frozen=True)
class Annotated:
    """Images of a data set with the truth about them.

    Attributes:
        samples: of the whole data set.
        rows: the images that count.
        ids: the data set's own category id of each class index of the model.
        truth: objects in these images.
    """

    samples: AnnotatedImages
    rows: Sequence[int]
    ids: Sequence[int]
    truth: GroundTruth

    @classmethod
    def read(
        cls,
        data: Path,
        images: Path | None,
        model: DetectorForObjectDetection,
        source: Path,
        most: int | None = None,
    ) -> Annotated:
        """Open a data set that a model has learned the classes of.

        Args:
            data: COCO json or another data set.
            images: folder of its images; None for its own surroundings.
            model: what has learned its classes.
            source: where the model came from, for messages.
            most: how many images count, spread over the data set; None for all.

        Raises:
            DataError: the data set cannot be read.
            ValueError: the model has not learned its classes, or nothing is annotated.
        """
        samples = evaluate.images_of(evaluate.Arguments(data=data, model=source, images=images))
        ids = evaluate.known_categories(model, samples, data=data, source=source)
        count = len(samples) if most is None else min(most, len(samples))
        rows = np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int)).tolist()
        kept = {samples.image_ids[row] for row in rows}
        content: dict[str, Any] = {
            "images": [entry for entry in samples.ground_truth["images"] if entry["id"] in kept],
            "annotations": [
                entry for entry in samples.ground_truth["annotations"] if entry["image_id"] in kept
            ],
            "categories": samples.ground_truth["categories"],
        }
        if not content["annotations"]:
            raise ValueError(f"{data}: has no annotations, so AP cannot be measured")
        return cls(samples, rows, ids, GroundTruth.from_coco(content))

    def known(self, results: Sequence[Any]) -> Detections:
        """What a model found, one entry an image that counts, in categories of the data set."""
        image_ids = [self.samples.image_ids[row] for row in self.rows]
        return self.select(Detections.from_results(results, image_ids, self.ids))

    def select(self, found: Detections) -> Detections:
        """Detections in categories of the data set."""
        present = np.array([category.id for category in self.samples.categories])
        return found.select(np.isin(found.category_ids, present))

    def ap(self, found: Detections) -> float:
        """AP as a fraction."""
        return float(evaluate_coco(self.truth, found).main[1])

    def pixels(self, row: int) -> Any:
        """An image as uint8 [H, W, 3]."""
        return self.samples[row].image.permute(1, 2, 0).numpy()

    def calibration(self) -> Calibration:
        """The images, with AP of what is found in them."""
        return Calibration(
            [self.pixels(row) for row in self.rows], lambda results: self.ap(self.known(results))
        )


def ap_of_both(
    data: Annotated,
    name: str,
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
) -> Measure:
    """Measures AP of a model and of a file exported from it, with the interval of the difference.

    The model looks at the images once. The file is measured as it will be used, with pixels and
    detections of `ExportedDetector`.

    Args:
        data: all images of a data set.
        name: of the data set.
        model: in PyTorch.
        processor: the model's.
    """
    from accelerate import Accelerator

    @cache
    def ours() -> Detections:
        return data.select(
            evaluate.detect_in(
                Accelerator(cpu=True), model, processor, data.samples, data.ids, MAX_DETECTIONS
            )
        )

    def measure(exported: ExportedDetector) -> Precision:
        theirs = data.known(
            [exported(data.pixels(row), 0.0, MAX_DETECTIONS, clip=False)[0] for row in data.rows]
        )
        weights = image_weights(len(data.truth.image_ids), _DRAWS)
        drawn = [
            resampled_ap(match(data.truth, data.truth.place(found), MAX_DETECTIONS), weights)
            for found in (ours(), theirs)
        ]
        low, high = np.percentile(drawn[1] - drawn[0], [2.5, 97.5]).tolist()
        return Precision(name, len(data.rows), data.ap(ours()), data.ap(theirs), (low, high))

    return measure
