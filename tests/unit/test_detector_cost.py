"""Parameters and arithmetic by part, against sums by hand; the command's tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detrelay.core.detector.cost import operations_by_part, parameters_by_part
from detrelay.heads import HEADS
from factories import small_config, small_head_config

QUERIES, SIDE = 4, 64


def test_parts_of_stageinteractor_are_those_by_hand() -> None:
    config = small_config(num_stages=4, num_queries=QUERIES)
    torch.manual_seed(0)
    model = HEADS["stageinteractor"].model(config).eval()
    found = operations_by_part(model, torch.rand(1, 3, SIDE, SIDE))
    generated = applied = adapted = gated = 0
    for stage in range(4):
        shape = config.mixing_shape(stage)
        dim, groups, width, points = shape.dim, shape.groups, shape.width, shape.points
        own = groups * (width**2 + shape.own_patterns * points)
        generated += dim * (own + groups * (width + shape.out_points))
        channel = groups * points * width**2
        applied += (1 + shape.reused) * channel + groups * shape.out_points * points * width
        axis, pattern = shape.base_points * width, shape.pattern * width
        adapters = groups * (shape.pattern * axis**2 + shape.base_points * pattern**2)
        adapted += shape.reused * adapters
        gated += 3 * shape.reused * dim**2
        gated += shape.reuse_spatial * dim * groups * (shape.own_patterns + points)
    per_query = {
        "generating filters": generated,
        "applying filters, own and reused": applied,
        "static adapters of reused filters": adapted,
        "gates of reused filters": gated,
        "from mixed features to the query": 4 * dim * groups * shape.out_points * width,
        "feed-forward networks": 4 * 2 * dim * config.ffn_dim,
    }
    for part, products in per_query.items():
        assert found[part] == 2 * QUERIES * products, part
    assert found["backbone"] > 0
    assert "rest of the head" not in found


@pytest.mark.parametrize("case", ["stageinteractor", "deformable_detr_two_stage", "dino"])
def test_no_parameter_is_lost(case: str) -> None:
    model = HEADS[case.removesuffix("_two_stage")].model(small_head_config(case))
    parts = parameters_by_part(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["backbone"] == sum(p.numel() for p in model.backbone.parameters())
    head = {"deformable_detr_two_stage": "encoder", "dino": "encoder"}
    assert head.get(case, "generating filters") in parts


@pytest.mark.parametrize(
    "case", ["deformable_detr", "deformable_detr_two_stage", "dn_detr", "dino"]
)
def test_the_encoder_of_every_head_is_counted_as_by_hand(case: str) -> None:
    config: Any = small_head_config(case)
    model = HEADS[case.removesuffix("_two_stage")].model(config).eval()
    found = operations_by_part(model, torch.rand(1, 3, 2 * SIDE, 2 * SIDE))
    points = config.num_attention_heads * config.num_levels * config.num_points
    dim, tokens = config.d_model, sum((2 * SIDE // stride) ** 2 for stride in (8, 16, 32, 64))
    by_layer = 2 * dim**2 + 3 * dim * points + 2 * dim * config.ffn_dim
    assert found["encoder"] == 2 * tokens * config.encoder_layers * by_layer
    assert all(parameter.requires_grad for parameter in model.parameters())
