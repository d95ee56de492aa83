"""The largest batch that fits into memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import detrelay.apps.train as train_app
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine import memory
from detrelay.core.engine.memory import Fit, find_fitting_batch
from detrelay.core.recipes.recipe import TrainConfig
from factories import make_head
from tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


@pytest.mark.parametrize(("fitting", "expected"), [(6, (6, 1)), (5, (3, 2)), (1, (1, 6))])
def test_the_largest_batch_that_fits_keeps_the_images_of_a_step(
    fitting: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, criterion = make_head("deformable_detr")
    forward = DetectorForObjectDetection.forward

    def short_of_memory(self: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        if len(pixel_values) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(DetectorForObjectDetection, "forward", short_of_memory)
    monkeypatch.setattr(memory, "_OBJECTS_PER_IMAGE", 2)
    before = copy.deepcopy(model.state_dict())
    settings = TrainConfig(batch_size=3, accumulation_steps=2)
    fit = find_fitting_batch(Accelerator(), model, criterion, settings, side=128)
    assert fit == Fit(*expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_image_that_never_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(memory, "_try_step", never)
    model, criterion = make_head("deformable_detr")
    with pytest.raises(ValueError, match="not even one image of 64 x 64 pixels fits"):
        find_fitting_batch(Accelerator(), model, criterion, TrainConfig(), side=64)


def test_a_run_uses_the_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = []

    def try_step(*arguments: Any) -> int:
        *_, side, size = arguments
        sides.append(side)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    monkeypatch.setattr(memory, "_try_step", try_step)
    assert tiny_run(tmp_path / "run", "train.epochs=1", find_batch_size=True) == 0
    assert "fits into memory: train.batch_size=2 train.accumulation_steps=2" in (
        capsys.readouterr().out
    )
    recipe = train_app.stored_recipe(tmp_path / "run")
    assert (recipe.train.batch_size, recipe.train.accumulation_steps) == (2, 2)
    assert set(sides) == {64}
