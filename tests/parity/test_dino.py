"""DINO against numbers of the released code, in float64."""

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
    TINY,
    Body,
    check_gradients,
    check_losses,
    check_matches,
    criterion,
    fill,
    reference_targets,
)
from detrelay.core.ops.deformable_attention import DeformableAttention
from detrelay.core.ops.position_encoding import grid_position_code
from detrelay.core.structures import Pairs, StageGroup, StagePrediction, Targets
from detrelay.heads import DinoConfig, DinoForObjectDetection
from detrelay.heads.deformable.denoising import Denoising, Noise
from detrelay.heads.deformable.dino import DinoHead
from detrelay.heads.deformable.layers import box_code, inverse_sigmoid, token_grid
from detrelay.heads.deformable.proposals import ProposalFeatures
from factories import mask_beside

FOLDER = Path(__file__).parent.parent / "assets" / "dino"
LOSS = DinoForObjectDetection.loss_config
LOGITS = {"atol": 1.7e-5, "rtol": 0}
BOXES = {"atol": 2.3e-6, "rtol": 0}


@cache
def load(name: str) -> Any:
    path = FOLDER / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def reference_model(**sizes: int) -> tuple[Body, dict[str, str]]:
    config = DinoConfig(num_labels=91, backbone_norm="frozen", **sizes)
    model = Body(config, DinoHead(config))
    keys = dict(load("manifest.json")["r50_4scale"]["keys"])
    keys["transformer.tgt_embed.weight"] = [config.num_queries, 256]
    return model, fill(model, keys, config)


def stored_noise(tensors: dict[str, Tensor], prefix: str) -> Noise:
    """The random numbers of the released run; it drew labels only where it needed them."""
    draw = tensors[f"{prefix}label_p"].double()
    label = torch.zeros(len(draw), dtype=torch.int64)
    label[draw < 0.25] = tensors[f"{prefix}new_labels"].long()
    return Noise(
        label_draw=draw,
        label=label,
        box_sign=tensors[f"{prefix}box_sign01"].double() * 2 - 1,
        box_size=tensors[f"{prefix}box_rand"].double(),
    )


@pytest.mark.parametrize(
    ("name", "sizes", "images"),
    [
        ("small", {"encoder_layers": 2, "decoder_layers": 3, "num_queries": 40}, SMALL),
        ("tiny_overflow", {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 200}, TINY),
    ],
)
def test_training_equals_released_program(
    name: str, sizes: dict[str, int], images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(f"{name}.safetensors")
    model, names = reference_model(**sizes)
    model.train()
    targets = reference_targets()
    noise = stored_noise(expected, "dn.")
    monkeypatch.setattr(model.head.denoising, "draw_noise", lambda *_: noise)
    made: list[Any] = []
    model.head.denoising.register_forward_hook(lambda _m, _a, out: made.append(out))
    groups = model.head(model.pyramid(*images), targets)
    decoder, proposals, denoising = groups
    assert [group.name for group in groups] == ["decoder", "proposals", "denoising"]

    dn = made[0]
    logit = dn.references.logit()
    torch.testing.assert_close(logit, expected["dn.query_bbox_unsig"].double(), **BOXES)
    assert torch.equal(
        mask_beside(dn, decoder.stages[0].logits.shape[1]).sum(1), expected["dn.attn_mask"].long()
    )
    torch.testing.assert_close(
        proposals.stages[0].boxes, expected["interm.boxes"].double(), **BOXES
    )
    torch.testing.assert_close(
        proposals.stages[0].logits[..., ::4], expected["interm.logits"].double(), **LOGITS
    )
    every = 8 if name == "tiny_overflow" else 1
    for index, (stage, noisy) in enumerate(zip(decoder.stages, denoising.stages, strict=True)):
        wanted = {key: expected[key][index].double() for key in
                  ("pred_logits", "pred_boxes", "dn.pred_logits_q7", "dn.pred_boxes")}  # fmt: skip
        torch.testing.assert_close(stage.logits[:, ::every], wanted["pred_logits"], **LOGITS)
        boxes = stage.boxes[:, :: 2 if every > 1 else 1]
        torch.testing.assert_close(boxes, wanted["pred_boxes"], **BOXES)
        torch.testing.assert_close(
            noisy.logits[:, ::7][:, ::4], wanted["dn.pred_logits_q7"], **LOGITS
        )
        torch.testing.assert_close(noisy.boxes[:, ::4], wanted["dn.pred_boxes"], **BOXES)
    output = criterion(LOSS)(groups, targets)
    check_matches(output, targets, expected)
    check_losses(output, expected, len(decoder.stages))
    output.total.backward()
    assert check_gradients(model, names, expected) > 80


def test_evaluation_equals_released_program() -> None:
    expected = load("small_eval.safetensors")
    model, _ = reference_model(encoder_layers=2, decoder_layers=3, num_queries=40)
    model.eval()
    with torch.no_grad():
        groups = model.head(model.pyramid(*SMALL), reference_targets())
    assert [group.name for group in groups] == ["decoder", "proposals"]
    for index, stage in enumerate(groups[0].stages):
        logits, boxes = expected["pred_logits"][index], expected["pred_boxes"][index]
        torch.testing.assert_close(stage.logits, logits.double(), **LOGITS)
        torch.testing.assert_close(stage.boxes, boxes.double(), **BOXES)


def targets_from(tensors: dict[str, Tensor], prefix: str) -> Targets:
    return Targets.from_labels(
        [
            {
                "class_labels": tensors[f"{prefix}gt_labels.{image}"].long(),
                "boxes": tensors[f"{prefix}gt_boxes.{image}"].double(),
            }
            for image in range(2)
        ]
    )


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("default_3_5", {}),
        ("one_empty_0_4", {}),
        ("all_empty", {}),
        ("over_100", {}),
        ("box04", {"box_noise_scale": 0.4}),
        ("dn50", {"denoising_queries": 50}),
        # the released code interprets small numbers of queries as half a number of groups
        ("small_dn_number_3", {"denoising_groups": 6}),
        ("no_noise", {"label_flip_chance": 0.0, "box_noise_scale": 0.0}),
    ],
)
def test_denoising_queries_equal_released_program(
    case: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, prefix = load("ops_and_cdn.safetensors"), f"cdn.{case}."
    config = DinoConfig(num_labels=91, d_model=32, **changes)
    denoising = Denoising(config, label_dim=4, contrastive=True, epsilon=1e-3).double()
    denoising.dim = 4
    rows = torch.arange(91, dtype=torch.float64)
    table = torch.stack([rows, torch.ones(91), torch.full((91,), 0.5), -rows], dim=1)
    denoising.labels.weight.data = table.double()
    if case != "no_noise":
        noise = stored_noise(tensors, prefix)
        monkeypatch.setattr(denoising, "draw_noise", lambda *_: noise)
    queries = denoising(targets_from(tensors, prefix), 6)
    expected = tensors[f"{prefix}query_label"].double()
    torch.testing.assert_close(queries.content, expected, atol=1e-6, rtol=0)
    logit = queries.references.logit()
    expected = tensors[f"{prefix}query_bbox_unsig"].double()
    torch.testing.assert_close(logit, expected, atol=2e-5, rtol=0)
    mask = tensors[f"{prefix}attn_mask"].long()
    found = mask_beside(queries, 6)
    found = found if mask.dim() == 2 else found.sum(1)
    assert torch.equal(found.long(), mask)
    assert torch.equal(queries.used, queries.content.any(-1))


@pytest.mark.parametrize("case", ["two_2_4", "mixed_3_0", "all_empty"])
def test_criterion_equals_released_program(case: str) -> None:
    tensors, prefix = load("criterion.safetensors"), f"crit.{case}."
    targets = targets_from(tensors, prefix)
    inputs = {
        name: tensors[f"{prefix}{name}"].double().requires_grad_()
        for name in ("logits", "boxes", "dn_logits", "dn_boxes")
        if f"{prefix}{name}" in tensors
    }
    *decoder, proposals = map(StagePrediction, inputs["logits"], inputs["boxes"])
    if case == "all_empty":
        nothing = torch.zeros(2, 0, 7, dtype=torch.float64)
        noisy = [StagePrediction(nothing, nothing[..., :4])] * 3
    else:
        noisy = list(map(StagePrediction, inputs["dn_logits"], inputs["dn_boxes"]))
    padded, groups = tensors[f"{prefix}dn_pad_groups"].tolist()
    # positives of a group, then its negatives
    rank = torch.cat([torch.arange(len(tensors[f"{prefix}gt_labels.{b}"])) for b in range(2)])
    query = torch.cat([rank + group * padded // groups for group in range(groups)])
    target = torch.arange(len(targets)).repeat(groups)
    known = Pairs(image=targets.image[target], query=query, target=target)
    output = criterion(LOSS)(
        (
            StageGroup("decoder", tuple(decoder)),
            StageGroup("proposals", (proposals,)),
            StageGroup("denoising", tuple(noisy), known_pairs=known),
        ),
        targets,
    )
    check_matches(output, targets, tensors, f"{prefix}match.")
    check_losses(output, tensors, len(decoder), f"{prefix}loss.")
    output.total.backward()
    for name, value in inputs.items():
        torch.testing.assert_close(
            value.grad, tensors[f"{prefix}g_{name}"].double(), atol=1e-6, rtol=1e-5
        )


def test_codes_and_anchors_equal_released_program() -> None:
    tensors = load("ops_and_cdn.safetensors")
    valid = ~tensors["posenc.mask"].bool()
    code = grid_position_code(valid, 32, 20, 0, torch.float64).transpose(1, 2)
    code, expected = code.unflatten(-1, valid.shape[1:]), tensors["posenc.T20"].double()
    real = valid[:, None].expand_as(code)
    torch.testing.assert_close(code[real], expected[real], atol=4e-6, rtol=0)
    boxes = tensors["sineembed.in"].double()[..., [1, 0, 2, 3]]
    expected = tensors["sineembed.out"].double()
    torch.testing.assert_close(box_code(boxes, 256), expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(
        inverse_sigmoid(tensors["inverse_sigmoid.in"].double(), 1e-3),
        tensors["inverse_sigmoid.eps1e-3"].double(),
        atol=1e-5,
        rtol=1e-6,
    )
    shapes = tensors["proposals.shapes"].tolist()
    mask = tensors["proposals.mask"].bool().split([h * w for h, w in shapes], dim=1)
    grid = token_grid([~m.unflatten(1, s) for m, s in zip(mask, shapes, strict=True)],
                      torch.float64)  # fmt: skip
    with torch.no_grad():
        _, anchors, proposes = ProposalFeatures(6).double()(
            tensors["proposals.memory"].double(), grid
        )
    expected = tensors["proposals.unsig"].double()
    torch.testing.assert_close(anchors, expected, atol=1e-5, rtol=0)
    assert torch.equal(proposes, expected.isfinite().all(-1))


@pytest.mark.parametrize("size", [2, 4])
def test_attention_equals_released_program(size: int) -> None:
    tensors = {k[5:]: v.double() for k, v in load("ops_and_cdn.safetensors").items()
               if k.startswith("msda.")}  # fmt: skip
    module = DeformableAttention(32, num_heads=4, num_levels=3, num_points=2).double()
    module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("param.")})
    shapes = tuple(map(tuple, load("ops_and_cdn.safetensors")["proposals.shapes"].tolist()))
    mask = load("ops_and_cdn.safetensors")["proposals.mask"].bool()
    queries, values = tensors["q"].requires_grad_(), tensors["v"].requires_grad_()
    references = tensors[f"ref{size}"].requires_grad_()
    out = module(queries, references, values, shapes, ~mask)
    torch.testing.assert_close(out, tensors[f"out{size}"], atol=1e-5, rtol=0)
    (out * tensors["loss_w"]).sum().backward()
    limits = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(queries.grad, tensors[f"gq{size}"], **limits)
    torch.testing.assert_close(values.grad, tensors[f"gv{size}"], **limits)
    torch.testing.assert_close(references.grad, tensors[f"gref{size}"], **limits)
    for name in ("attention_weights", "sampling_offsets"):
        found = module.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(found, tensors[f"g_{name}_w{size}"], **limits)
