"""Activation checkpointing: less memory, the same numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from detrelay.core.detector.checkpointing import checkpoint_activations, repeated_layers
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.logging import read_metrics
from factories import SMALL_HEADS, make_head, make_targets
from factories_backbones import make_model
from tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


@pytest.mark.parametrize("case", sorted(SMALL_HEADS))
def test_checkpointed_activations_change_no_loss_and_no_gradient(case: str) -> None:
    model, criterion = make_head(case)
    targets = make_targets((3, 0))
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))

    def step(model: DetectorForObjectDetection) -> tuple[dict[str, Any], list[Any], int]:
        kept: list[int] = []
        torch.manual_seed(1)  # the noise of denoising
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.append(x.numel()), x)[1], lambda x: x
        )
        with hooks:
            result = criterion(model(pixel_values=pixels, targets=targets).groups, targets)
        result.total.backward()
        return result.losses, [p.grad for p in model.parameters()], sum(kept)

    saving = copy.deepcopy(model)
    checkpoint_activations(saving)
    losses, gradients, size = step(model)
    others, other_gradients, less = step(saving)
    assert less < size
    for key, loss in losses.items():
        assert torch.equal(others[key], loss), key
    for first, second in zip(gradients, other_gradients, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-7)


def test_blocks_that_learn_statistics_are_not_run_twice() -> None:
    class BasicBlock(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    model, _ = make_head("deformable_detr")
    model.backbone.add_module("learning", BasicBlock())
    model.backbone.add_module("fixed", BasicBlock().requires_grad_(False))
    model.backbone.fixed.norm.track_running_stats = False
    checkpoint_activations(model)
    assert "forward" not in vars(model.backbone.learning)
    assert "forward" in vars(model.backbone.fixed)


def test_a_run_that_saves_memory_logs_the_losses_of_one_that_does_not(tmp_path: Path) -> None:
    for name, setting in (("plain", "false"), ("saving", "true")):
        settings = ("train.epochs=1", f"train.activation_checkpointing={setting}")
        assert tiny_run(tmp_path / name, *settings) == 0
    plain, saving = (
        [line.get("loss") for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "saving")
    )
    assert saving == pytest.approx(plain, rel=1e-4) if None not in plain else plain[:3]


def test_layers_that_repeat_are_found_for_checkpointing() -> None:
    kinds = {type(layer).__name__ for layer in repeated_layers(make_model("swin"))}
    assert kinds == {"SwinLayer", "StageInteractorStage"}
