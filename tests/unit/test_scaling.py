"""Learning rates for other batches than the published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from detrelay.core.engine.logging import read_metrics
from detrelay.core.engine.scaling import describe_step, with_scaled_rate
from detrelay.core.recipes.recipe import TrainConfig
from tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


def test_learning_rates_for_other_batches() -> None:
    settings = TrainConfig(
        batch_size=2, accumulation_steps=2, learning_rate=1e-4, published_batch_size=16
    )
    line = describe_step(settings, 1)
    assert "step: 4 images (1 process(es) x 2 images x 2 pass(es)), learning rate 0.0001" in line
    assert "published: 16 images, learning rate 0.0001" in line
    assert "linear makes it 2.5e-05, sqrt 5e-05" in line
    assert "linear makes" not in describe_step(replace(settings, batch_size=8), 1)
    for rule, expected in (("none", 1e-4), ("linear", 2.5e-5), ("sqrt", 5e-5)):
        scaled = with_scaled_rate(replace(settings, scale_learning_rate=rule), 4)
        assert scaled.learning_rate == pytest.approx(expected)
    other = replace(settings, scale_learning_rate="linear", published_batch_size=8)
    assert with_scaled_rate(other, 4).learning_rate == pytest.approx(5e-5)
    unpublished = replace(other, published_batch_size=None)
    assert "published" not in describe_step(replace(unpublished, scale_learning_rate="none"), 1)
    with pytest.raises(ValueError, match=r"needs train\.published_batch_size"):
        with_scaled_rate(unpublished, 4)


def test_the_scaled_rate_is_the_one_that_trains(tmp_path: Path) -> None:
    settings = (
        *("train.epochs=1", "train.warmup_steps=0"),
        *("train.scale_learning_rate=linear", "train.published_batch_size=16"),
    )
    assert tiny_run(tmp_path / "run", *settings) == 0
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["learning_rate"] == pytest.approx(1e-3 * 4 / 16)
