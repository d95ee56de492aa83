"""StageInteractor against numbers of the released code, in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from detrelay.assigners import build_assigners
from detrelay.core.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.losses import class_targets
from detrelay.core.structures import FeaturePyramid, StageGroup, StagePrediction, Targets
from detrelay.heads import StageInteractorConfig, StageInteractorForObjectDetection
from detrelay.heads.convert.conversion import translate
from detrelay.heads.stageinteractor.geometry import position_code
from detrelay.heads.stageinteractor.head import StageInteractorHead
from reference import stageinteractor_value, unit

FOLDER = Path(__file__).parent.parent / "assets" / "stageinteractor"
STAGES = 6
STRIDES = (4, 8, 16, 32)
LOSS_NAMES = {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}
LOSS = StageInteractorForObjectDetection.loss_config


def tiny_config(**changes: Any) -> StageInteractorConfig:
    values = {
        "d_model": 64,
        "ffn_dim": 96,
        "num_labels": 7,
        "num_queries": 12,
        "pattern_size": 4,
        "num_base_points_first": 3,
        "num_base_points": 2,
        "num_out_points": 16,
    }
    return StageInteractorConfig(**{**values, **changes})


@cache
def load(name: str) -> Any:
    path = FOLDER / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


@cache
def reference_weights() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Our state of the reference run, and our names by official ones."""
    official = {}
    for key, (shape, kind, total) in load("manifest.json")["tiny"]["keys"].items():
        value = stageinteractor_value(key, tuple(shape), kind == "norm")
        assert value.double().sum().item() == pytest.approx(total, rel=1e-6, abs=1e-4)
        official[key] = value
    translation = translate(official, tiny_config())
    assert not translation.unknown
    return translation.state, dict(translation.used)


def reference_head() -> StageInteractorHead:
    head = StageInteractorHead(tiny_config()).double()
    state = {
        name.removeprefix("head."): value.double()
        for name, value in reference_weights()[0].items()
        if name.startswith("head.")
    }
    head.load_state_dict(state)  # strict: every parameter has its official counterpart
    return head


def reference_pyramid() -> FeaturePyramid:
    shapes = [(256 // stride, 320 // stride) for stride in STRIDES]
    levels = [unit(f"feat.tiny.{i}", (2, 64, h, w)).double() for i, (h, w) in enumerate(shapes)]
    return FeaturePyramid(
        levels=tuple(level.requires_grad_() for level in levels),
        strides=STRIDES,
        valid=tuple(torch.ones(2, h, w, dtype=torch.bool) for h, w in shapes),
        image_sizes=torch.tensor([[256, 320], [240, 300]]),
    )


def targets_from(tensors: dict[str, Tensor], prefix: str, sizes: Tensor) -> Targets:
    labels = []
    for index, (height, width) in enumerate(sizes.tolist()):
        corners = tensors[f"{prefix}gt_boxes.{index}"].double()
        scale = torch.tensor([width, height, width, height], dtype=torch.float64)
        labels.append(
            {
                "class_labels": tensors[f"{prefix}gt_labels.{index}"].long(),
                "boxes": xyxy_to_cxcywh(corners / scale),
            }
        )
    return Targets.from_labels(labels)


def criterion(assigner: str = "cross_stage") -> Criterion:
    return Criterion(LOSS.terms(), build_assigners(assigner, LOSS))


def check_targets(
    output: CriterionOutput,
    stages: tuple[StagePrediction, ...],
    targets: Targets,
    expected: dict[str, Tensor],
    prefix: str = "",
) -> None:
    """Matches and class targets of every stage, exactly."""
    for index, (stage, assignment) in enumerate(
        zip(stages, output.assignments["decoder"], strict=True)
    ):
        first_of_image = torch.searchsorted(targets.image, torch.arange(targets.batch_size))
        matched = torch.zeros(stage.logits.shape[:2], dtype=torch.int64)
        pairs = assignment.boxes
        matched[pairs.image, pairs.query] = pairs.target - first_of_image[pairs.image] + 1
        torch.testing.assert_close(matched, expected[f"{prefix}gt_inds.{index}"].long())
        wanted = class_targets(stage, targets, assignment.classes)
        torch.testing.assert_close(wanted, expected[f"{prefix}cls_target.{index}"].to(wanted))


def check_losses(output: CriterionOutput, expected: dict[str, float], tolerance: float) -> None:
    weights = {term.name: term.weight for term in LOSS.terms()}
    for index in range(STAGES):
        for ours, official in LOSS_NAMES.items():
            value = output.losses[f"decoder/{index}/{ours}"].item() * weights[ours]
            wanted = expected[f"stage{index}_{official}"]
            assert value == pytest.approx(wanted, abs=tolerance), (index, ours)


def test_forward_equals_released_program() -> None:
    pyramid = reference_pyramid()
    expected = load("tiny_forward.safetensors")
    scale = torch.tensor([[320, 256, 320, 256], [300, 240, 300, 240]]).double()[:, None]
    head = reference_head()
    queries: list[Tensor] = []
    for stage in head.stages:
        stage.register_forward_hook(lambda _module, _args, out: queries.append(out[1].queries))
    with torch.no_grad():
        (group,) = head(pyramid)
    assert group.name == "decoder"
    assert len(group.stages) == STAGES
    for index, stage in enumerate(group.stages):
        boxes = cxcywh_to_xyxy(stage.boxes * scale)
        where = f"f64.stage{index}"
        torch.testing.assert_close(stage.logits, expected[f"{where}.cls_logits"], atol=1e-9, rtol=0)
        torch.testing.assert_close(boxes, expected[f"{where}.boxes"], atol=1e-7, rtol=0)
        torch.testing.assert_close(queries[index], expected[f"{where}.query"], atol=1e-9, rtol=0)


def test_training_equals_released_program() -> None:
    pyramid = reference_pyramid()
    head = reference_head()
    tensors, facts = load("tiny_train.safetensors"), load("tiny.json")["train"]["f64"]
    targets = targets_from(tensors, "", pyramid.image_sizes)
    groups = head(pyramid)
    output = criterion()(groups, targets)
    check_targets(output, groups[0].stages, targets, tensors)
    check_losses(output, facts["losses"], 1e-7)
    output.total.backward()
    parameters = dict(head.named_parameters())
    names = reference_weights()[1]
    compared = 0
    for official, norm in facts["grad_norm"].items():
        name = names.get(official)
        if name is None:
            assert norm == 0, official
            continue
        gradient = parameters[name.removeprefix("head.")].grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-6, abs=1e-12), name
        if (stored := tensors.get(f"grad.{official}")) is not None:
            # stored in float32: relative to the tensor's largest entry
            torch.testing.assert_close(
                gradient, stored.double(), atol=1e-6 * stored.abs().max().item() + 1e-12, rtol=1e-6
            )
            compared += 1
    assert compared > 200
    for level, norm in zip(pyramid.levels, facts["feat_grad_norm"], strict=True):
        assert level.grad is not None
        assert level.grad.norm().item() == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("case", list(json.loads((FOLDER / "assigner_cases.json").read_text())))
def test_assigner_cases(case: str) -> None:
    tensors, facts = load("assigner_cases.safetensors"), load("assigner_cases.json")[case]
    prefix = f"{case}."
    sizes = torch.tensor(facts["img_shapes_hw"])
    scale = sizes.flip(-1).repeat(1, 2)[:, None].double()
    corners = [
        tensors[f"{prefix}boxes.{s}"].double().requires_grad_() for s in range(facts["num_stages"])
    ]
    logits = [
        tensors[f"{prefix}logits.{s}"].double().requires_grad_() for s in range(facts["num_stages"])
    ]
    stages = tuple(
        StagePrediction(logit, xyxy_to_cxcywh(corner / scale))
        for logit, corner in zip(logits, corners, strict=True)
    )
    targets = targets_from(tensors, prefix, sizes)
    output = criterion()((StageGroup("decoder", stages),), targets)
    check_targets(output, stages, targets, tensors, prefix)
    # the exact-half case is known in float32 only
    check_losses(output, facts.get("losses_f64", facts["losses"]), 1e-6)
    output.total.backward()
    for index in range(facts["num_stages"]):
        for name, value in (("boxes", corners[index]), ("logits", logits[index])):
            expected = tensors[f"{prefix}grad_{name}.{index}"].double()
            torch.testing.assert_close(value.grad, expected, atol=1e-7, rtol=1e-6)


def test_position_code_frequencies_are_float32() -> None:
    code = position_code(torch.tensor([[0.0, 0.0, 1e6, 0.0]], dtype=torch.float64), 64)
    width = 16
    frequency = 10000 ** (2 * torch.arange(width // 2, dtype=torch.float32) / width)
    expected = (1e6 / frequency.double()).sin()
    torch.testing.assert_close(code[0, 2 * width : 3 * width : 2], expected, atol=1e-9, rtol=0)


def test_criterion_stays_in_float32_for_half_precision_predictions() -> None:
    head, pyramid = reference_head(), reference_pyramid()
    tensors = load("tiny_train.safetensors")
    targets = targets_from(tensors, "", pyramid.image_sizes)
    targets = replace(targets, boxes=targets.boxes.float())
    with torch.no_grad():
        (group,) = head(pyramid)
    half = tuple(StagePrediction(s.logits.bfloat16(), s.boxes.bfloat16()) for s in group.stages)
    output = criterion()((StageGroup("decoder", half),), targets)
    assert output.total.dtype == torch.float32
