"""Charts of an evaluation: precision and recall, confusion, calibration, errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detrelay.core.evaluation.analysis import Analysis, Calibration, Confusion
from detrelay.core.evaluation.backends import RECALL_THRESHOLDS
from detrelay.core.evaluation.tide import ErrorBreakdown

_MAX_NAMED_CURVES = 12
_MAX_NUMBERED_CLASSES = 20
_MAX_NAMED_CLASSES = 90
_GREY, _BLUE, _RED = "0.7", "#2b6cb0", "#c05621"


def draw_analysis(analysis: Analysis, folder: Path) -> list[Path]:
    """Write all charts of an analysis; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [figures.name for figures in analysis.categories]
    charts = {
        "precision_recall": precision_recall(analysis),
        "confusion": confusion(analysis.confusion, names),
        "calibration": calibration(analysis.calibration),
        "errors": errors(analysis.errors),
    }
    return [save(figure, folder / f"{name}.png") for name, figure in charts.items()]


def save(figure: Figure, target: Path) -> Path:
    """Write a figure as PNG and close it."""
    figure.savefig(target, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return target


def precision_recall(analysis: Analysis) -> Figure:
    """Precision against recall: the means, and each category at IoU 0.5."""
    figure, (means, each) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for name, curve in analysis.curves.items():
        means.plot(RECALL_THRESHOLDS, curve, label=f"{name}: AP {100 * np.mean(curve):.1f}")
    named = len(analysis.category_curves) <= _MAX_NAMED_CURVES
    for name, curve in analysis.category_curves.items():
        if named:
            each.plot(RECALL_THRESHOLDS, curve, lw=1.2, label=f"{name}: {100 * np.mean(curve):.1f}")
        else:
            each.plot(RECALL_THRESHOLDS, curve, lw=0.6, color=_BLUE, alpha=0.35)
    means.set_title(f"Mean over categories (maxDets {analysis.max_detections})", fontsize=10)
    count = len(analysis.category_curves)
    each.set_title(f"The {count} categories with objects, IoU 0.50", fontsize=10)
    for axis in (means, each):
        axis.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower left")
    means.set_ylabel("precision")
    return figure


def confusion(matrix: Confusion, names: Sequence[str]) -> Figure:
    """Counts by category of the object and of the detection; colours by share of the row."""
    counts = matrix.counts
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    size = min(16.0, 3.0 + 0.45 * len(counts))
    figure, axis = plt.subplots(figsize=(size + 1, size))
    picture = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axis, fraction=0.046, pad=0.03, label="share of row")
    if len(counts) <= _MAX_NUMBERED_CLASSES:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                color = "white" if share[row, column] > 0.6 else "black"
                text = str(counts[row, column])
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    if len(counts) <= _MAX_NAMED_CLASSES:
        places = range(len(counts))
        small = 8 if len(counts) <= _MAX_NUMBERED_CLASSES else 5
        axis.set_xticks(places, [*names, "missed"], rotation=90, fontsize=small)
        axis.set_yticks(places, [*names, "nothing there"], fontsize=small)
    axis.set(xlabel="taken for", ylabel="object")
    axis.set_title(f"IoU 0.5, scores from {matrix.threshold:g}", fontsize=10)
    return figure


def calibration(bins: Calibration) -> Figure:
    """Share of correct detections against their score, and how many there are."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(5, 5.5), sharex=True, height_ratios=(3, 1))
    width = 1 / len(bins.counts)
    centres = (np.arange(len(bins.counts)) + 0.5) * width
    upper.bar(centres, [value or 0 for value in bins.right], width * 0.92, color=_BLUE)
    upper.plot([0, 1], [0, 1], color=_GREY, ls="--", label="perfectly calibrated")
    summary = "no detections" if bins.error is None else f"expected error {100 * bins.error:.1f} %"
    upper.set_title(f"Calibration at IoU 0.5: {summary}", fontsize=10)
    upper.set(ylabel="share of correct detections", ylim=(0, 1), xlim=(0, 1))
    upper.legend(fontsize=8)
    lower.bar(centres, bins.counts, width * 0.92, color=_GREY)
    lower.set_yscale("symlog")
    lower.set(xlabel="score", ylabel="detections")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    return figure


def errors(breakdown: ErrorBreakdown) -> Figure:
    """AP gained by fixing each kind of error, and how many there are."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    kinds = list(breakdown.gains)
    bars = axis.barh(kinds, [100 * breakdown.gains[kind] for kind in kinds], color=_RED)
    axis.bar_label(bars, [f"{breakdown.counts[kind]} errors" for kind in kinds], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("AP gained if fixed, points")
    axis.set_title(
        f"Errors at IoU {breakdown.threshold:g}: AP {100 * breakdown.ap:.1f}, the best "
        f"{breakdown.max_detections} detections per image",
        fontsize=10,
    )
    _only_left_and_bottom(axis)
    return figure


def _only_left_and_bottom(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
