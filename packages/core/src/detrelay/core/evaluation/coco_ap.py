"""COCO average precision and recall of boxes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detrelay.core.evaluation.backends import AREAS, Accumulated, BackendName, accumulate
from detrelay.core.evaluation.tables import Detections, Floats, GroundTruth

_LIMITS = (1, 10, 100)
IOU_50, IOU_75 = 0, 5


@dataclass(frozen=True, slots=True)
class CocoResult:
    """The figures of one evaluation, as fractions; -1 if there is no object to find.

    Attributes:
        stats: the twelve figures of COCO by name: AP over IoU 0.50:0.95, AP50, AP75, AP by area of
            the object (small below 32 x 32 pixels, large above 96 x 96), AR_1, AR_10 and AR_100 by
            number of detections, AR by area; also, say, AR_300 if more detections were requested.
        per_category: AP by category name.
        max_detections: maximum detections per category and image.
    """

    stats: dict[str, float]
    per_category: dict[str, float]
    max_detections: int

    @property
    def main(self) -> tuple[str, float]:
        """Name and value of the first figure, by which models are compared."""
        return next(iter(self.stats.items()))

    def limit(self, name: str) -> int:
        """The maxDets of a figure: maximum detections per category and image that it counts."""
        if name == "AP":
            return min(100, self.max_detections)
        count = name.removeprefix("AR_")
        return min(int(count), self.max_detections) if count.isdigit() else self.max_detections

    def to_dict(self) -> dict[str, Any]:
        """The result as plain numbers, for json."""
        return {
            "stats": dict(self.stats),
            "AP_per_category": dict(self.per_category),
            "max_detections": self.max_detections,
            "maxDets": {name: self.limit(name) for name in self.stats},
        }

    def table(self) -> str:
        """The result as text, in percent; categories without objects show a dash."""
        title = f"AP by category (maxDets {self.limit('AP')})"
        width = max(map(len, [title, *self.stats, *self.per_category]))
        lines = [
            f"{name:<{width}}  {_percent(value)}  maxDets {self.limit(name)}"
            for name, value in self.stats.items()
        ]
        lines += ["", title]
        lines += [
            f"{name:<{width}}  {_percent(value)}" for name, value in self.per_category.items()
        ]
        return "\n".join(lines)


def evaluate_coco(
    ground_truth: Mapping[str, Any] | GroundTruth,
    detections: Sequence[Mapping[str, Any]] | Detections,
    *,
    max_detections: int = 100,
    backend: BackendName = "pycocotools",
) -> CocoResult:
    """Score detections against a COCO ground truth.

    Detections of equal score rank by their order. The limit on detections applies, as in
    pycocotools, per category and image. With a limit above 100, AP, AP by category and AR_1, AR_10,
    AR_100 are unaffected; AP50, AP75 and all figures by area use `max_detections`, and
    AR_<max_detections> is added. These are the figures that the stock evaluator prints when its
    three limits are raised to (100, 300, 1000), as is done for published detectors with 300
    queries.

    Args:
        ground_truth: `images`, `annotations` (crowds marked by `iscrowd`) and `categories`.
        detections: columns, or rows with `image_id`, `category_id`, `bbox` [x, y, width, height]
            in pixels and `score`.
        max_detections: maximum detections per category and image.
        backend: the implementation; the figures are the same.

    Raises:
        DataError: a detection names an unknown image or category or has a non-finite number, or two
            categories share a name.
        ValueError: `max_detections` is below 1, or the back end is unknown or not installed.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, found {max_detections}")
    if not isinstance(ground_truth, GroundTruth):
        ground_truth = GroundTruth.from_coco(ground_truth)
    if not isinstance(detections, Detections):
        detections = Detections.from_rows(detections)
    found = ground_truth.place(detections)
    accumulated = accumulate(ground_truth, found, limits_of(max_detections), backend)
    return summarize(accumulated, ground_truth.names, max_detections)


def detections_from_results(
    results: Iterable[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows in COCO's results format, see `Detections.from_results`."""
    return list(Detections.from_results(results, image_ids, category_ids).rows())


def limits_of(max_detections: int) -> list[int]:
    """All maxDets that the figures need, ascending."""
    return sorted({min(limit, max_detections) for limit in (*_LIMITS, max_detections)})


def summarize(accumulated: Accumulated, names: Sequence[str], max_detections: int) -> CocoResult:
    """The twelve figures and AP by category.

    Args:
        accumulated: made with `limits_of(max_detections)`.
        names: names of the K categories.
        max_detections: maximum detections per category and image.
    """
    precision, recall, limits = accumulated.precision, accumulated.recall, accumulated.limits
    at_100 = limits.index(min(100, max_detections))
    stats = {
        "AP": mean_of_measured(precision[..., 0, at_100]),
        "AP50": mean_of_measured(precision[IOU_50, ..., 0, -1]),
        "AP75": mean_of_measured(precision[IOU_75, ..., 0, -1]),
    }
    for area, label in enumerate(AREAS[1:], start=1):
        stats[f"AP_{label}"] = mean_of_measured(precision[..., area, -1])
    for limit in sorted({*_LIMITS, max(_LIMITS[-1], max_detections)}):
        column = limits.index(min(limit, max_detections))
        stats[f"AR_{limit}"] = mean_of_measured(recall[..., 0, column])
    for area, label in enumerate(AREAS[1:], start=1):
        stats[f"AR_{label}"] = mean_of_measured(recall[..., area, -1])
    per_category = {
        name: mean_of_measured(precision[:, :, row, 0, at_100]) for row, name in enumerate(names)
    }
    return CocoResult(stats, per_category, max_detections)


def mean_of_measured(values: Floats) -> float:
    """Mean over the measured values (-1 marks unmeasured ones), or -1."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else -1.0


def _percent(value: float) -> str:
    return f"{100 * value:5.1f}" if value >= 0 else "    -"
