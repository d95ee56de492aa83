"""Means, intervals and differences of runs, and the tables that show them.

A run is a sample of both images and seeds. A setting's AP is the mean over its seeds. Its squared
standard error is the variance over seeds divided by their number, plus the variance of that mean
when the images are resampled with replacement. Differences to the baseline are paired: between runs
of equal seeds and over the same resampled images. Intervals are Student's t with the degrees of
freedom of Welch and Satterthwaite. The effect of seeds on single images counts twice, so intervals
are too wide rather than too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from detrelay.core.evaluation.tables import Floats

_CONFIDENCE = 0.95
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_NORMAL_FROM = 1e6  # degrees of freedom; the quantiles then agree to six digits


@dataclass(frozen=True, slots=True, eq=False)
class RunScores:
    """The scores of one finished run.

    Attributes:
        seed: its seed.
        ap: AP on all images, a fraction.
        ap50: AP at IoU 0.5.
        resampled: float64 [R], AP over resampled images; the same draws for every run.
        minutes: training time; None if not measured.
    """

    seed: int
    ap: float
    ap50: float
    resampled: Floats
    minutes: float | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: over seeds.
        low: lower end.
        high: upper end.
        images_only: there is only one seed, so the variance over seeds is unknown.
    """

    mean: float
    low: float
    high: float
    images_only: bool

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Row:
    """One setting of a comparison.

    Attributes:
        name: the setting.
        seeds: seeds of its finished runs.
        missing: what is missing, in words; empty if all runs are finished.
        ap: mean AP; None if runs are missing.
        ap50: mean AP50; None if runs are missing.
        difference: AP minus that of the baseline; None for the baseline and if runs of either are
            missing.
        minutes: mean minutes per run; None if unknown.
    """

    name: str
    seeds: tuple[int, ...]
    missing: str
    ap: Interval | None
    ap50: float | None
    difference: Interval | None
    minutes: float | None


def interval(by_seed: Floats, resampled: Floats) -> Interval:
    """The interval of a mean over seeds.

    Args:
        by_seed: [n], a figure for each seed on all images.
        resampled: [n, R], the same over resampled images.
    """
    count, mean = len(by_seed), float(by_seed.mean())
    of_images = float(resampled.mean(axis=0).var(ddof=1))
    of_seeds = float(by_seed.var(ddof=1)) / count if count > 1 else 0.0
    variance = of_images + of_seeds
    freedom = math.inf if of_seeds == 0 else (count - 1) * (variance / of_seeds) ** 2
    reach = student_quantile(freedom, _CONFIDENCE) * math.sqrt(variance)
    return Interval(mean, mean - reach, mean + reach, images_only=count == 1)


def student_quantile(freedom: float, confidence: float) -> float:
    """The t with P(|T| <= t) = `confidence`, of Student's distribution.

    With t = sqrt(n) tan(angle) the density is proportional to cos(angle)^(n - 1). The distribution
    function is concave for positive t, so that Newton's method rises to the quantile from that of
    the normal distribution, which lies below it.

    Args:
        freedom: n, its degrees of freedom, at least 1.
        confidence: between 0 and 1.
    """
    quantile = NormalDist().inv_cdf(0.5 + confidence / 2)
    if freedom > _NORMAL_FROM:
        return quantile
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale *= 2 / math.sqrt(math.pi)
    for _ in range(50):
        angle = math.atan(quantile / math.sqrt(freedom))
        inside = np.cos(angle * (_NODES + 1) / 2) ** (freedom - 1)
        held = scale * angle / 2 * float(inside @ _WEIGHTS)
        density = scale / math.sqrt(freedom) * math.cos(angle) ** (freedom + 1)
        step = (confidence - held) / density
        quantile += step
        if abs(step) < 1e-12 * quantile:
            break
    return quantile


def compare(
    settings: Mapping[str, Sequence[RunScores]],
    baseline: str,
    missing: Mapping[str, str] | None = None,
) -> list[Row]:
    """Compare settings with a baseline, paired by seed and by image.

    Args:
        settings: finished runs by setting.
        baseline: a key of `settings`.
        missing: what is missing, in words, by setting; such a setting gets no mean.

    Raises:
        ValueError: the baseline is unknown, or a complete setting has other seeds than the
            baseline, so that runs cannot be paired.
    """
    missing = missing or {}
    if baseline not in settings:
        raise ValueError(f"no setting {baseline!r}; there are {', '.join(settings)}")
    order = [baseline, *(name for name in settings if name != baseline)]
    base = _by_seed(settings[baseline])
    rows = []
    for name in order:
        runs = _by_seed(settings[name])
        gap = missing.get(name, "" if runs else "no run is finished")
        seeds = tuple(run.seed for run in runs)
        if gap:
            rows.append(Row(name, seeds, gap, None, None, None, None))
            continue
        difference = None
        if name != baseline and not missing.get(baseline):
            base_seeds = tuple(run.seed for run in base)
            if seeds != base_seeds:
                raise ValueError(
                    f"setting {name} has the seeds {_listed(seeds)}, the baseline {baseline} has "
                    f"{_listed(base_seeds)}: differences need the same; run those that are missing"
                )
            difference = interval(
                np.array([run.ap - other.ap for run, other in zip(runs, base, strict=True)]),
                np.stack(
                    [run.resampled - other.resampled for run, other in zip(runs, base, strict=True)]
                ),
            )
        minutes = [run.minutes for run in runs if run.minutes is not None]
        rows.append(
            Row(
                name=name,
                seeds=seeds,
                missing="",
                ap=interval(
                    np.array([run.ap for run in runs]), np.stack([run.resampled for run in runs])
                ),
                ap50=float(np.mean([run.ap50 for run in runs])),
                difference=difference,
                minutes=float(np.mean(minutes)) if len(minutes) == len(runs) else None,
            )
        )
    return rows


def _by_seed(runs: Sequence[RunScores]) -> list[RunScores]:
    return sorted(runs, key=lambda run: run.seed)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


def markdown(rows: Sequence[Row], max_detections: int) -> str:
    """The comparison as a Markdown table, in percent."""
    lines = [
        f"| setting | seeds | AP (maxDets {min(100, max_detections)}) | AP50 (maxDets "
        f"{max_detections}) | difference to {rows[0].name} | minutes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(_cells(row, plus_minus='±', dash='-'))} |" for row in rows]
    return "\n".join([*lines, "", _caption(rows)])


def latex(rows: Sequence[Row], max_detections: int) -> str:
    """The comparison as a LaTeX table (booktabs), in percent."""
    head = (
        rf"setting & seeds & AP$_{{{min(100, max_detections)}}}$ & "
        rf"AP50$_{{{max_detections}}}$ & difference & minutes \\"
    )
    body = [
        " & ".join(_escaped(cell) for cell in _cells(row, plus_minus=r"$\pm$", dash="--")) + r" \\"
        for row in rows
    ]
    return "\n".join(
        [
            r"\begin{tabular}{lrrrrr}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
            r"\end{tabular}", f"% {_caption(rows)}",
        ]
    )  # fmt: skip


def _cells(row: Row, *, plus_minus: str, dash: str) -> list[str]:
    """Text of one row."""
    if row.ap is None or row.ap50 is None:
        return [row.name, _listed(row.seeds), row.missing, dash, dash, dash]
    reach = 100 * (row.ap.high - row.ap.mean)
    mark = "*" if row.ap.images_only else ""
    difference = dash
    if row.difference is not None:
        low, high = 100 * row.difference.low, 100 * row.difference.high
        clear = "" if row.difference.excludes_zero else ", not clear"
        difference = f"{100 * row.difference.mean:+.1f} [{low:+.1f}, {high:+.1f}]{mark}{clear}"
    return [
        row.name,
        _listed(row.seeds),
        f"{100 * row.ap.mean:.1f} {plus_minus} {reach:.1f}{mark}",
        f"{100 * row.ap50:.1f}",
        difference,
        dash if row.minutes is None else f"{row.minutes:.1f}",
    ]


def _escaped(cell: str) -> str:
    return cell.replace("%", r"\%").replace("_", r"\_").replace("&", r"\&")


def _caption(rows: Sequence[Row]) -> str:
    text = (
        "95 % intervals over seeds and resampled images; differences paired by seed and image; "
        '"not clear": the interval contains 0.'
    )
    shown = [entry for row in rows for entry in (row.ap, row.difference) if entry is not None]
    if any(entry.images_only for entry in shown):
        text += " *: one seed, so the interval is over images only."
    return text
