"""Beyond AP: confusion, calibration, best thresholds, figures by category and size, errors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from detrelay.core.evaluation.backends import AREAS, RECALL_THRESHOLDS, Accumulated
from detrelay.core.evaluation.coco_ap import mean_of_measured
from detrelay.core.evaluation.matching import Matches, claim, match
from detrelay.core.evaluation.tables import Floats, Found, GroundTruth, Ints, box_iou
from detrelay.core.evaluation.tide import MEANINGS, ErrorBreakdown, error_breakdown

_BINS = 10
_IOU_50, _IOU_75 = 0, 5
# IoU of a correct detection in all figures that are not averaged over thresholds
IOU = 0.5


@dataclass(frozen=True, slots=True)
class BestThreshold:
    """The score threshold with the highest F1 of a category, at IoU 0.5.

    Attributes:
        score: minimum score of a kept detection where F1 is highest; the highest such score in case
            of a tie.
        f1: harmonic mean of precision and recall there.
        precision: share of kept detections that are correct.
        recall: share of objects that are found.
    """

    score: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well scores agree with the share of correct detections (IoU 0.5), in bins of equal width.

    Attributes:
        counts: detections by bin.
        scores: mean score by bin; None for an empty bin.
        right: share of correct detections by bin; None for an empty bin.
        error: expected calibration error: mean difference of the two, weighted by `counts`; None
            without detections.
    """

    counts: list[int]
    scores: list[float | None]
    right: list[float | None]
    error: float | None


@dataclass(frozen=True, slots=True)
class Confusion:
    """Confusion matrix at IoU 0.5.

    First every object is matched to a detection of its own category, as for AP; then the remaining
    objects and detections are matched across categories, best score first.

    Attributes:
        counts: int [K + 1, K + 1]. Row: category of the object, the last for no object. Column:
            category of the detection, the last for no detection. All rows but the last add up to
            the objects of their category, all columns but the last to the kept detections.
        excused: detections on crowds of their category, which are not counted.
        threshold: minimum score of a kept detection.
    """

    counts: Ints
    excused: int
    threshold: float


@dataclass(frozen=True, slots=True)
class CategoryFigures:
    """Figures of one category, as fractions; -1 if there is no object to find.

    Attributes:
        name: the category's name.
        objects: objects to find, crowds not counted.
        detections: detections that were evaluated.
        ap: AP by area of the object ("all", "small", ...), mean over IoU 0.50:0.95.
        ap50: AP at IoU 0.5.
        ap75: AP at IoU 0.75.
        ar: AR by area of the object.
        best: the best threshold; None without a correct detection.
        calibration_error: see `Calibration.error`.
    """

    name: str
    objects: int
    detections: int
    ap: dict[str, float]
    ap50: float
    ap75: float
    ar: dict[str, float]
    best: BestThreshold | None
    calibration_error: float | None


@dataclass(frozen=True, slots=True)
class Analysis:
    """All figures beyond COCO's twelve.

    Attributes:
        categories: by category.
        curves: precision at 101 recalls by name: mean over categories at IoU 0.5, at 0.75, and
            over IoU 0.50:0.95; empty without objects.
        category_curves: the same at IoU 0.5 by category name, for categories with objects.
        confusion: the confusion matrix.
        calibration: of all categories together.
        errors: breakdown of errors by kind.
        max_detections: maximum detections per category and image in everything but `errors`.
    """

    categories: tuple[CategoryFigures, ...]
    curves: dict[str, list[float]]
    category_curves: dict[str, list[float]]
    confusion: Confusion
    calibration: Calibration
    errors: ErrorBreakdown
    max_detections: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, for json."""
        content = asdict(self)
        content["confusion"]["counts"] = self.confusion.counts.tolist()
        content["recalls"] = RECALL_THRESHOLDS.tolist()
        return content

    def table(self) -> str:
        """Figures by category and error kind, as text; percent, a dash if nothing was measured."""
        columns = ("objects", "AP", "AP50", "AP75", *(f"AP_{area}" for area in AREAS[1:]))
        columns += ("AR", "best score", "F1", "calibration error")
        rows = [
            (
                figures.name,
                str(figures.objects),
                *map(_percent, (figures.ap["all"], figures.ap50, figures.ap75)),
                *(_percent(figures.ap[area]) for area in AREAS[1:]),
                _percent(figures.ar["all"]),
                f"{figures.best.score:.2f}" if figures.best else "-",
                _percent(figures.best.f1 if figures.best else -1),
                _percent(-1 if figures.calibration_error is None else figures.calibration_error),
            )
            for figures in self.categories
        ]
        lines = _aligned([(f"maxDets {self.max_detections}", *columns), *rows])
        errors = self.errors
        title = f"errors at IoU {errors.threshold:g}, maxDets {errors.max_detections} per image"
        kinds = [
            (kind, str(errors.counts[kind]), f"{100 * gain:.2f}", MEANINGS[kind])
            for kind, gain in errors.gains.items()
        ]
        return "\n".join([*lines, "", *_aligned([(title, "count", "AP gained", ""), *kinds])])


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns of text: the first and a last one of words left-aligned, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = {0} | ({len(widths) - 1} if rows[0][-1] == "" else set())
    return [
        "  ".join(
            f"{cell:<{width}}" if place in words else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value >= 0 else "-"


def analyse(
    truth: GroundTruth,
    found: Found,
    accumulated: Accumulated,
    *,
    score_threshold: float = 0.3,
) -> Analysis:
    """Analyse detections on one dataset.

    Args:
        truth: the objects.
        found: the detections.
        accumulated: precision and recall of the same; its largest limit is that of the analysis.
        score_threshold: minimum score of detections in the confusion matrix.
    """
    limit = accumulated.limits[-1]
    matches = match(truth, found, limit, np.array([IOU]))
    return Analysis(
        categories=tuple(
            _category(truth, matches, accumulated, row) for row in range(len(truth.names))
        ),
        curves=_curves(accumulated.precision[..., 0, -1]),
        category_curves={
            name: curve.tolist()
            for name, curve in zip(
                truth.names, accumulated.precision[_IOU_50, :, :, 0, -1].T, strict=True
            )
            if curve[0] >= 0
        },
        confusion=confusion(truth, found, score_threshold, limit),
        calibration=calibration(matches),
        errors=error_breakdown(truth, found, max_detections=limit),
        max_detections=limit,
    )


def _category(
    truth: GroundTruth, matches: Matches, accumulated: Accumulated, row: int
) -> CategoryFigures:
    precision, recall = accumulated.precision[:, :, row], accumulated.recall[:, row]
    own = matches.found.category == row
    return CategoryFigures(
        name=truth.names[row],
        objects=int(matches.objects[:, row].sum()),
        detections=int(own.sum()),
        ap={name: mean_of_measured(precision[..., a, -1]) for a, name in enumerate(AREAS)},
        ap50=mean_of_measured(precision[_IOU_50, :, 0, -1]),
        ap75=mean_of_measured(precision[_IOU_75, :, 0, -1]),
        ar={name: mean_of_measured(recall[:, a, -1]) for a, name in enumerate(AREAS)},
        best=best_threshold(matches, row),
        calibration_error=calibration(matches, row).error,
    )


def _curves(precision: Floats) -> dict[str, list[float]]:
    """Means over the categories that have objects; [10, 101, K] in."""
    measured = precision[..., precision[0, 0] > -1]
    if not measured.shape[-1]:
        return {}
    by_threshold = measured.mean(axis=-1)
    return {
        "IoU 0.50": by_threshold[_IOU_50].tolist(),
        "IoU 0.75": by_threshold[_IOU_75].tolist(),
        "IoU 0.50:0.95": by_threshold.mean(axis=0).tolist(),
    }


def best_threshold(matches: Matches, category: int) -> BestThreshold | None:
    """The score that gives a category its highest F1; None without a correct detection."""
    rows = np.flatnonzero((matches.found.category == category) & ~matches.ignored[0])
    order = rows[np.argsort(-matches.found.scores[rows], kind="stable")]
    objects = int(matches.objects[:, category].sum())
    true = np.cumsum(matches.target[0, order] >= 0)
    if objects == 0 or not len(order) or true[-1] == 0:
        return None
    scores = matches.found.scores[order]
    cut = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # equal scores stay together
    true, kept = true[cut], cut + 1
    f1 = 2 * true / (kept + objects)
    place = int(np.argmax(f1))
    return BestThreshold(
        score=float(scores[cut[place]]),
        f1=float(f1[place]),
        precision=float(true[place] / kept[place]),
        recall=float(true[place] / objects),
    )


def calibration(matches: Matches, category: int | None = None) -> Calibration:
    """Compare scores with the share of correct detections.

    Args:
        matches: at one threshold; scores from 0 to 1 (others count in the first or last bin).
        category: only detections of this category.
    """
    keep = ~matches.ignored[0]
    if category is not None:
        keep = keep & (matches.found.category == category)
    scores, right = matches.found.scores[keep], matches.target[0, keep] >= 0
    bins = np.floor(scores * _BINS).clip(0, _BINS - 1).astype(np.int64)
    counts = np.bincount(bins, minlength=_BINS)
    score_sums = np.bincount(bins, weights=scores, minlength=_BINS)
    right_sums = np.bincount(bins, weights=right, minlength=_BINS)
    error = float(np.abs(score_sums - right_sums).sum() / len(scores)) if len(scores) else None
    return Calibration(
        counts=counts.tolist(),
        scores=[float(s / n) if n else None for s, n in zip(score_sums, counts, strict=True)],
        right=[float(s / n) if n else None for s, n in zip(right_sums, counts, strict=True)],
        error=error,
    )


def confusion(truth: GroundTruth, found: Found, threshold: float, max_detections: int) -> Confusion:
    """Count confusions, see `Confusion`.

    Args:
        truth: the objects.
        found: the detections.
        threshold: minimum score of a kept detection.
        max_detections: maximum detections per category and image.
    """
    kept = found.select(found.scores >= threshold)
    matches = match(truth, kept, max_detections, np.array([IOU]))
    kept, target = matches.found, matches.target[0].copy()
    taken = np.zeros(len(truth), dtype=np.bool_)
    taken[target[target >= 0]] = True
    open_objects = np.flatnonzero(~taken & ~truth.crowd)
    open_objects = open_objects[np.argsort(truth.image[open_objects], kind="stable")]
    open_claims = np.flatnonzero((target < 0) & ~matches.ignored[0])
    order = np.lexsort((-kept.scores[open_claims], kept.image[open_claims]))
    open_claims = open_claims[order]
    object_image, claim_image = truth.image[open_objects], kept.image[open_claims]
    for image in np.intersect1d(object_image, claim_image):
        objects = open_objects[slice(*np.searchsorted(object_image, [image, image + 1]))]
        claims = open_claims[slice(*np.searchsorted(claim_image, [image, image + 1]))]
        iou = box_iou(kept.boxes_xywh[claims], truth.boxes_xywh[objects])
        columns = claim(iou, IOU, np.zeros(len(objects), np.bool_))
        target[claims] = np.where(columns >= 0, objects[columns], -1)
    categories = len(truth.names)
    counts = np.zeros((categories + 1, categories + 1), dtype=np.int64)
    hit = target >= 0
    np.add.at(counts, (truth.category[target[hit]], kept.category[hit]), 1)
    stray = kept.category[~hit & ~matches.ignored[0]]
    counts[categories, :categories] = np.bincount(stray, minlength=categories)
    taken[target[hit]] = True
    missed = truth.category[~taken & ~truth.crowd]
    counts[:categories, categories] = np.bincount(missed, minlength=categories)
    return Confusion(counts, int(matches.ignored[0].sum()), threshold)
