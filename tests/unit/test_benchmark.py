"""What the benchmark of training says about a step; how fast it is, no test asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark_training import TrainingCase, draw_images, recipe_of, train_here
from detrelay.apps.build import build_datasets

CASE = TrainingCase(
    recipe="shapes_dino",
    precision="no",
    compiled=False,
    batch_size=2,
    height=64,
    width=96,
    steps=2,
    threads=1,
)


def test_parts_of_a_training_step_add_up() -> None:
    row = train_here(CASE)
    assert list(row.shares) == ["data", "backbone", "head", "losses", "backward", "update"]
    assert all(share > 0 for share in row.shares.values())
    assert 0.9 < sum(row.shares.values()) <= 1  # the rest lies between the parts
    assert row.images_per_second * row.seconds == pytest.approx(2)


def test_drawn_images_have_the_size_to_be_resized_from(tmp_path: Path) -> None:
    recipe = recipe_of(CASE, draw_images(tmp_path, 3, CASE.height, CASE.width))
    train, val = build_datasets(recipe.data)
    assert len(train) == len(val) == 3
    assert train[2].image.shape == (3, round(0.48 * 64), round(0.48 * 96))
    assert len(train[2].boxes_xyxy) == 7
