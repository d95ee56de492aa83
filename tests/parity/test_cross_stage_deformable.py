"""Cross-stage labels against numbers of the released Deformable DETR variant."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detrelay.assigners import CrossStageAssigner, HungarianAssigner
from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.losses import LossConfig, class_targets
from detrelay.core.structures import StageGroup, StagePrediction, Targets

WINDOWS: dict[str, tuple[int | None, int | None]] = {
    "own_only": (0, 0),
    "prev_future_own": (-1, None),
    "all_in_order": (None, None),
}
# the released head takes box targets from the window's last stage: here that is the stage itself
OWN_BOXES = ("own_only", "prev_future_own")
SCENES = ("crowd", "one_empty")


@cache
def load() -> dict[str, Tensor]:
    return load_file(
        Path(__file__).parent.parent / "assets" / "cross_stage/cross_stage.safetensors"
    )


def scene(name: str) -> tuple[list[StagePrediction], Targets]:
    tensors = load()
    stages = [
        StagePrediction(logits.clone().requires_grad_(), boxes.clone().requires_grad_())
        for logits, boxes in zip(tensors[f"{name}.logits"], tensors[f"{name}.boxes"], strict=True)
    ]
    targets = Targets.from_labels(
        [
            {
                "class_labels": tensors[f"{name}.gt_labels.{image}"].long(),
                "boxes": tensors[f"{name}.gt_boxes_cxcywh.{image}"],
            }
            for image in range(2)
        ]
    )
    return stages, targets


def run(name: str, window: str, **options: Any) -> tuple[CriterionOutput, list[StagePrediction]]:
    stages, targets = scene(name)
    assigner = CrossStageAssigner(window=WINDOWS[window], inclusive=False, **options)
    criterion = Criterion(LossConfig().terms(), {"decoder": assigner})
    return criterion((StageGroup("decoder", tuple(stages)),), targets), stages


def labels_of(output: CriterionOutput, name: str) -> Tensor:
    """Multi-hot class targets of all stages, [S, B, Q, K]."""
    stages, targets = scene(name)
    return torch.stack(
        [
            class_targets(stage, targets, assignment.classes)
            for stage, assignment in zip(stages, output.assignments["decoder"], strict=True)
        ]
    )


@pytest.mark.parametrize("name", SCENES)
def test_matches_equal_released_head(name: str) -> None:
    stages, targets = scene(name)
    expected = load()[f"{name}.hungarian_labels"].long()
    for stage, assignment, labels in zip(
        stages, HungarianAssigner()(stages, targets), expected, strict=True
    ):
        found = torch.full_like(labels, stage.logits.shape[-1])
        pairs = assignment.classes
        found[pairs.image, pairs.query] = targets.labels[pairs.target]
        assert torch.equal(found, labels)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("window", WINDOWS)
def test_labels_equal_the_rule_and_the_released_head(name: str, window: str) -> None:
    tensors = load()
    plain = labels_of(run(name, window)[0], name)
    assert torch.equal(plain.byte(), tensors[f"{name}.{window}.diag_rule"])
    leaked = labels_of(run(name, window, leak=True)[0], name)
    assert torch.equal(leaked.byte(), tensors[f"{name}.{window}.soft_label"])
    if window == "prev_future_own":
        kept = labels_of(run(name, window, keep_own=True)[0], name)
        assert torch.equal(kept.byte(), tensors[f"{name}.{window}.diag_rule_keep_own"])


def check(output: CriterionOutput, prefix: str, names: dict[str, str]) -> None:
    weights = {term.name: term.weight for term in LossConfig().terms()}
    for ours, official in names.items():
        for stage, wanted in enumerate(load()[f"{prefix}{official}"].flatten().tolist()):
            value = weights[ours] * output.losses[f"decoder/{stage}/{ours}"].item()
            assert value == pytest.approx(wanted, rel=2e-6), (stage, ours)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("window", WINDOWS)
def test_losses_equal_released_head(name: str, window: str) -> None:
    tensors, prefix = load(), f"{name}.{window}."
    boxes = {"l1": "loss_bbox", "giou": "loss_iou"} if window in OWN_BOXES else {}
    output, stages = run(name, window, leak=True)
    check(output, prefix, {"class": "loss_cls", **boxes})
    output.total.backward()
    for index, stage in enumerate(stages):
        torch.testing.assert_close(
            stage.logits.grad, tensors[f"{prefix}g_logits"][index], atol=1e-6, rtol=1e-5
        )
        if window in OWN_BOXES:
            torch.testing.assert_close(
                stage.boxes.grad, tensors[f"{prefix}g_boxes"][index], atol=1e-5, rtol=1e-5
            )
    if window in OWN_BOXES:
        output, _ = run(name, window)
        check(output, f"{prefix}spec.", {"class": "loss_cls", **boxes})
