"""Deformable DETR against numbers of the released code, in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deformable_reference import (
    SMALL,
    Body,
    check_gradients,
    check_losses,
    check_matches,
    criterion,
    fill,
    reference_targets,
)
from detrelay.core.ops.position_encoding import grid_position_code
from detrelay.core.structures import StageGroup, StagePrediction, Targets
from detrelay.heads import DeformableDetrConfig, DeformableDetrForObjectDetection
from detrelay.heads.deformable.detr import DeformableDetrHead
from detrelay.heads.deformable.layers import box_code, inverse_sigmoid
from reference import deformable_images

FOLDER = Path(__file__).parent.parent / "assets" / "deformable_detr"
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"decoder_layers": 3},
    "refine": {"decoder_layers": 3, "box_refinement": True},
    "two_stage": {"decoder_layers": 4, "box_refinement": True, "two_stage": True},
}
LOSS = DeformableDetrForObjectDetection.loss_config


@cache
def load(name: str) -> Any:
    path = FOLDER / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def config_of(variant: str, **changes: Any) -> DeformableDetrConfig:
    flags = {key: value for key, value in VARIANTS[variant].items() if key != "decoder_layers"}
    return DeformableDetrConfig(num_labels=91, backbone_norm="frozen", **{**flags, **changes})


def reference_model(
    variant: str,
) -> tuple[Body | DeformableDetrForObjectDetection, dict[str, str]]:
    config = config_of(
        variant,
        encoder_layers=2,
        num_queries=24,
        dropout=0,
        decoder_layers=VARIANTS[variant]["decoder_layers"],
    )
    # one variant goes through the backbone
    model = (
        DeformableDetrForObjectDetection(config)
        if variant == "base"
        else Body(config, DeformableDetrHead(config))
    )
    keys = dict(load("manifest.json")[variant]["keys"])
    keys["query_embed.weight"] = [config.num_queries, 512]
    names = fill(model, keys, config)
    return model.train(), names


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_equals_released_program(variant: str) -> None:
    expected = load(f"{variant}_small.safetensors")
    model, names = reference_model(variant)
    targets = reference_targets()
    encoded: list[Any] = []
    model.head.encoder.register_forward_hook(lambda _m, _a, out: encoded.append(out))
    if isinstance(model, DeformableDetrForObjectDetection):
        groups = model(*deformable_images(*SMALL)).groups
    else:
        pyramid = model.pyramid(*SMALL)
        for level, valid in enumerate(pyramid.valid):
            assert torch.equal(~valid, expected[f"mask.{level}"].bool())
        torch.testing.assert_close(
            pyramid.levels[3][:, ::16], expected["probe.src.3"].double(), atol=1e-5, rtol=0
        )
        groups = model.head(pyramid, targets)
    tokens, grid = encoded[0]
    # padding is never read; the released run encoded its position in float32
    real = grid.valid[:, ::8]
    memory = expected["probe.memory"].double()
    torch.testing.assert_close(tokens[:, ::8, ::16][real], memory[real], atol=1e-5, rtol=0)
    for index, stage in enumerate(groups[0].stages):
        logits, boxes = expected["pred_logits"][index], expected["pred_boxes"][index]
        torch.testing.assert_close(stage.logits, logits.double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(stage.boxes, boxes.double(), atol=1.5e-6, rtol=0)
    if variant == "two_stage":
        check_proposals(groups[1], expected)
    output = criterion(LOSS)(groups, targets)
    check_matches(output, targets, expected)
    check_losses(output, expected, len(groups[0].stages))
    output.total.backward()
    assert check_gradients(model, names, expected) > 100


def check_proposals(group: StageGroup, expected: dict[str, Tensor]) -> None:
    assert group.name == "proposals"
    assert group.class_agnostic
    (stage,) = group.stages
    logits, boxes = expected["enc_class0_logit"], expected["enc_coord_sigmoid"]
    torch.testing.assert_close(stage.logits[..., 0], logits.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(stage.boxes[:, ::4], boxes.double(), atol=1.5e-6, rtol=0)
    torch.testing.assert_close(
        stage.logits[:, ::13][:, ::8], expected["probe.enc_class"].double(), atol=1e-5, rtol=0
    )
    # what the decoder starts from
    best = logits.topk(24).indices
    assert torch.equal(best, expected["enc_topk"].long())
    chosen = stage.boxes.gather(1, best[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(chosen, expected["init_reference"].double(), atol=1.5e-6, rtol=0)


@pytest.mark.parametrize("case", ["two_2_4", "mixed_3_0", "all_empty"])
def test_criterion_equals_released_program(case: str) -> None:
    tensors = load("ops_and_criterion.safetensors")
    prefix = f"crit.{case}."
    inputs = {
        name: tensors[f"{prefix}{name}"].double().requires_grad_()
        for name in ("logits", "boxes", "enc_logits", "enc_boxes")
    }
    stages = tuple(
        StagePrediction(logits, boxes)
        for logits, boxes in zip(inputs["logits"], inputs["boxes"], strict=True)
    )
    proposals = (StagePrediction(inputs["enc_logits"], inputs["enc_boxes"]),)
    groups = (
        StageGroup("decoder", stages),
        StageGroup("proposals", proposals, class_agnostic=True),
    )
    targets = Targets.from_labels(
        [
            {
                "class_labels": tensors[f"{prefix}gt_labels.{image}"].long(),
                "boxes": tensors[f"{prefix}gt_boxes.{image}"].double(),
            }
            for image in range(2)
        ]
    )
    output = criterion(LOSS)(groups, targets)
    check_matches(output, targets, tensors, f"{prefix}match.")
    check_losses(output, tensors, len(stages), f"{prefix}loss.")
    output.total.backward()
    for name, value in inputs.items():
        torch.testing.assert_close(
            value.grad, tensors[f"{prefix}g_{name}"].double(), atol=1e-6, rtol=1e-5
        )


def test_codes_equal_released_program() -> None:
    tensors = load("ops_and_criterion.safetensors")
    valid = ~tensors["posenc.mask"].bool()
    for dim in (32, 256):
        code = grid_position_code(valid, dim, 10000, -0.5, torch.float64)
        code = code.transpose(1, 2).unflatten(-1, valid.shape[1:])
        expected = tensors[f"posenc.T10000_off_d{dim}"].double()
        # on padding any finite number is fine
        real = valid[:, None].expand_as(code)
        torch.testing.assert_close(code[real], expected[real], atol=4e-6, rtol=0)
        assert code.isfinite().all()
    torch.testing.assert_close(
        inverse_sigmoid(tensors["inverse_sigmoid.in"].double(), 1e-5),
        tensors["inverse_sigmoid.eps1e-5"].double(),
        atol=1e-5,
        rtol=1e-6,
    )
    boxes = tensors["proposal_pos_embed.in_unsig"].double().sigmoid()
    torch.testing.assert_close(
        box_code(boxes, 256), tensors["proposal_pos_embed.out"].double(), atol=2e-6, rtol=0
    )
