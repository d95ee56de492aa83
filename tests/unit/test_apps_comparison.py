"""Intervals and differences of runs: by hand, and whether they keep their promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from detrelay.apps.comparison import (
    Interval,
    Row,
    RunScores,
    compare,
    interval,
    latex,
    markdown,
    student_quantile,
)
from detrelay.core.evaluation.backends import IOU_THRESHOLDS
from detrelay.core.evaluation.matching import Matches
from detrelay.core.evaluation.resampling import image_weights, resampled_ap
from detrelay.core.evaluation.tables import Found


@pytest.mark.parametrize("freedom", [1.0, 1.3, 2.0, 7.7, 100.0, 1e5, 1e7, np.inf])
def test_quantiles_are_those_of_scipy(freedom: float) -> None:
    for confidence in (0.5, 0.95, 0.99):
        expected = student.ppf(0.5 + confidence / 2, freedom)
        assert student_quantile(freedom, confidence) == pytest.approx(expected, rel=1e-6)


def test_interval_by_hand() -> None:
    resampled = np.array([[0.1, 0.3], [0.3, 0.5], [0.2, 0.4]])  # means 0.2, 0.4: variance 0.02
    found = interval(np.array([0.1, 0.2, 0.3]), resampled)  # variance 0.01, a third of it
    variance = 0.02 + 0.01 / 3
    freedom = variance**2 / ((0.01 / 3) ** 2 / 2)
    reach = student.ppf(0.975, freedom) * variance**0.5
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - reach, 0.2 + reach))
    assert not found.images_only
    single = interval(np.array([0.2]), resampled[:1])
    assert single.images_only
    assert single.high - single.mean == pytest.approx(1.959964 * 0.02**0.5, rel=1e-6)


def scores(seed: int, ap: float, shift: float = 0.0) -> RunScores:
    draws = np.linspace(-0.02, 0.02, 41)
    return RunScores(seed, ap, ap + 0.2, ap + draws + shift, minutes=2.0 + seed)


SETTINGS = {
    "labels": [scores(1, 0.46), scores(0, 0.44), scores(2, 0.45)],
    "base": [scores(0, 0.40), scores(1, 0.42), scores(2, 0.41)],
}


def test_differences_are_paired_by_seed_and_image() -> None:
    base, labels = compare(SETTINGS, "base")
    assert (base.name, labels.name) == ("base", "labels")
    assert base.difference is None
    assert labels.difference is not None
    # the seeds' and the images' own ups and downs are the same in both, and cancel
    assert labels.difference.mean == pytest.approx(0.04)
    assert labels.difference.high - labels.difference.low == pytest.approx(0, abs=1e-9)
    assert labels.difference.excludes_zero
    assert labels.ap is not None
    assert labels.ap.high - labels.ap.low > 0.04
    assert labels.minutes == 3.0


def test_no_mean_where_runs_are_missing() -> None:
    rows = compare(SETTINGS, "base", {"labels": "seed 2 is missing"})
    assert rows[1].ap is rows[1].ap50 is rows[1].difference is rows[1].minutes is None
    for table in (markdown(rows, 100), latex(rows, 100)):
        line = next(line for line in table.splitlines() if "labels" in line)
        assert "seed 2 is missing" in line
        assert "45" not in line
    without_base = compare(SETTINGS, "base", {"base": "seed 1 is missing"})
    assert without_base[1].difference is None
    assert without_base[1].ap is not None


def test_other_seeds_cannot_be_paired() -> None:
    settings = {"base": SETTINGS["base"], "labels": SETTINGS["labels"][:2]}
    with pytest.raises(ValueError, match=r"labels has the seeds 0, 1, the baseline base has 0, 1"):
        compare(settings, "base")
    with pytest.raises(ValueError, match=r"no setting 'x'; there are labels, base"):
        compare(SETTINGS, "x")


def test_tables_show_percent() -> None:
    wide, narrow = Interval(0.412, 0.4, 0.424, False), Interval(0.0123, -0.001, 0.0256, False)
    rows = [
        Row("base_0", (0, 1), "", wide, 0.6, None, None),
        Row("new", (0,), "", wide, 0.61, narrow, 3.25),
    ]
    lines = markdown(rows, 300).splitlines()
    assert lines[0].startswith("| setting | seeds | AP (maxDets 100) | AP50 (maxDets 300) |")
    assert lines[2] == "| base_0 | 0, 1 | 41.2 ± 1.2 | 60.0 | - | - |"
    assert lines[3] == "| new | 0 | 41.2 ± 1.2 | 61.0 | +1.2 [-0.1, +2.6], not clear | 3.2 |"
    single = [replace(rows[0], ap=replace(wide, images_only=True))]
    assert "41.2 ± 1.2*" in markdown(single, 100)
    assert "over images only" in markdown(single, 100)
    tex = latex(rows, 300).splitlines()
    assert r"base\_0 & 0, 1 & 41.2 $\pm$ 1.2 & 60.0 & -- & -- \\" in tex


IMAGES, OBJECTS, QUERIES, DRAWS = 600, 3, 5, 50
THRESHOLDS = IOU_THRESHOLDS[[0, 5]]
_DIFFICULTY, _LUCK = 0.8, 0.03


def simulated_run(difficulty: np.ndarray, skill: float, generator: np.random.Generator) -> Matches:
    """A run whose detections find objects by chance: easy images more often than hard ones."""
    image = np.repeat(np.arange(IMAGES), QUERIES)
    logit = skill + generator.normal(0, _LUCK) - difficulty[image]
    quality = generator.uniform(0.5, 1.0, len(image))  # IoU with its object
    first = np.tile(np.arange(QUERIES) < OBJECTS, IMAGES)  # the others are wrong
    lucky = generator.random(len(image)) < 1 / (1 + np.exp(-logit))
    right = first & lucky
    scores = generator.beta(2, 2, len(image)) * 0.6 + 0.4 * right * generator.random(len(image))
    found = Found(image, np.zeros_like(image), np.zeros((len(image), 4)), scores)
    target = np.where(right & (quality >= THRESHOLDS[:, None]), np.arange(len(image)), -1)
    return Matches(
        found, target, np.zeros_like(target, dtype=np.bool_),
        np.full((IMAGES, 1), OBJECTS), THRESHOLDS,
    )  # fmt: skip


def simulated_difference(
    skills: tuple[float, float], seeds: int, generator: np.random.Generator
) -> Interval:
    """The difference of two simulated settings."""
    difficulty = generator.normal(0, _DIFFICULTY, IMAGES)
    weights = image_weights(IMAGES, DRAWS, int(generator.integers(2**31)))
    settings = {
        name: [
            RunScores(seed, float(values[0]), 0.0, values[1:])
            for seed in range(seeds)
            for values in [
                resampled_ap(
                    simulated_run(difficulty, skill, generator),
                    np.vstack([np.ones(IMAGES), weights]),
                )
            ]
        ]
        for name, skill in zip(("base", "new"), skills, strict=True)
    }
    new = compare(settings, "base")[1]
    assert new.difference is not None
    return new.difference


@pytest.mark.slow
def test_equal_settings_seldom_differ_and_three_points_are_found() -> None:
    generator = np.random.default_rng(0)
    false = [simulated_difference((1.0, 1.0), 3, generator) for _ in range(200)]
    assert sum(difference.excludes_zero for difference in false) <= 10  # 5 percent
    found = [simulated_difference((1.0, 1.25), 5, generator) for _ in range(40)]
    assert np.mean([difference.mean for difference in found]) == pytest.approx(0.03, abs=0.004)
    assert np.mean([difference.excludes_zero for difference in found]) > 0.8
    assert np.mean([difference.low < 0.03 < difference.high for difference in found]) >= 0.95
