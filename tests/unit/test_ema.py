"""The average of the weights: its values, and that it is published."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detrelay.core.engine.ema import average_of
from factories import make_head
from tiny_run import final_weights, tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


def test_the_average_follows_weights_and_buffers_from_before_the_first_step() -> None:
    model, _ = make_head("stageinteractor")
    average = average_of(model, 0.75)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = 0.75**2 * before[key] + (1 - 0.75**2) * (before[key] + 1)
            torch.testing.assert_close(value, expected)
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_average_is_evaluated_published_and_kept(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "plain", "train.epochs=1") == 0
    assert tiny_run(tmp_path / "run", "train.epochs=1", "train.ema_decay=0.5") == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_0000003")
    trained = load_file(checkpoint / "model.safetensors")
    published = final_weights(tmp_path / "run")
    averaged = load_file(checkpoint / "model_1.safetensors")
    plain = final_weights(tmp_path / "plain")
    for key, value in plain.items():
        assert torch.equal(trained[key], value)  # training itself does not notice
        assert torch.equal(averaged[key], published[key])
    assert any(not torch.equal(published[key], plain[key]) for key in plain)
