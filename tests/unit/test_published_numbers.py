"""Every published number that is a default here, stated a second time.

A changed default changes what everybody trains; this table makes that visible.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from detrelay.assigners import ASSIGNERS
from detrelay.assigners.costs import (
    COSTS,
    FocalClassCost,
    GIoUBoxCost,
    L1BoxCost,
    default_costs,
)
from detrelay.core.data.augmentation import TRANSFORMS
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.losses import LossConfig
from detrelay.core.recipes.recipe import DataConfig, TrainConfig
from detrelay.heads import HEADS

_ALL: dict[str, Any] = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
_ALL |= {"alpha": 0.25, "gamma": 2.0, "class_loss": "focal"}

LOSSES: dict[str, dict[str, Any]] = {
    "stageinteractor": {"l1_format": "xyxy", "giou_epsilon": 0.0, "log_epsilon": 1e-12},
    "deformable_detr": {"l1_format": "cxcywh", "giou_epsilon": 0.0, "log_epsilon": 1e-8},
    "dn_detr": {"l1_format": "cxcywh", "giou_epsilon": 0.0, "log_epsilon": 1e-8},
    "dino": {
        "class_weight": 1.0, "l1_format": "cxcywh", "giou_epsilon": 1e-6, "log_epsilon": 1e-8,
    },
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "stageinteractor": {
        "num_queries": 100, "d_model": 256, "num_levels": 4, "num_groups": 4, "num_stages": 6,
        "num_attention_heads": 8, "pattern_size": 8, "num_base_points": 4,
        "num_base_points_first": 8, "num_out_points": 128, "ffn_dim": 2048,
        "max_reused_filters": None, "finest_scale": 3.0, "center_unit": "size",
    },
    "deformable_detr": {
        "num_queries": 300, "d_model": 256, "num_levels": 4, "num_points": 4, "ffn_dim": 1024,
        "num_attention_heads": 8, "encoder_layers": 6, "decoder_layers": 6, "dropout": 0.1,
    },
    "dn_detr": {
        "num_queries": 300, "denoising_groups": 5, "label_flip_chance": 0.2,
        "box_noise_scale": 0.4, "dropout": 0.1,
    },
    "dino": {
        "num_queries": 900, "ffn_dim": 2048, "dropout": 0.0, "denoising_groups": None,
        "denoising_queries": 100, "label_flip_chance": 0.25, "box_noise_scale": 1.0,
    },
}  # fmt: skip

CROSS_STAGE = {
    "window": (-1, None), "iou_threshold": 0.5, "inclusive": True, "keep_own": False,
    "leak": False, "scope": "all",
}  # fmt: skip

PARTS: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (ASSIGNERS["cross_stage"], CROSS_STAGE),
    (ASSIGNERS["repeated"], {"times": 6, "max_share": None}),
    (ASSIGNERS["rank_weighted"], {"tau": 1.5, "epsilon": 0.0}),
    (ASSIGNERS["one_to_many"], {"threshold": 0.4, "at_most": 6, "iou_weight": 0.7}),
    (ASSIGNERS["iou"], {"threshold": 0.6, "at_most": 4, "best_of_target": True}),
    (ASSIGNERS["simota"], {"radius": 2.5, "best_overlaps": 5}),
    (COSTS["focal"], {"weight": 2.0, "alpha": 0.25, "gamma": 2.0, "epsilon": 1e-12}),
    (COSTS["softmax"], {"weight": 1.0}),
    (COSTS["l1"], {"weight": 5.0, "box_format": "cxcywh"}),
    (COSTS["giou"], {"weight": 2.0, "epsilon": 0.0}),
    (COSTS["position_modulated"], {"weight": 2.0, "power": 0.5, "epsilon": 1e-8}),
    (COSTS["high_order"], {"weight": 1.0, "power": 4.0, "epsilon": 0.0}),
    (TRANSFORMS["crop"], {"probability": 0.5}),
    (TRANSFORMS["photometric_distort"], {"probability": 0.5}),
    (TRANSFORMS["iou_crop"], {"probability": 0.8}),
    (DetrelayImageProcessor.post_process_object_detection, {"threshold": 0.5, "top_k": 100}),
    (DataConfig, {
        "flip_probability": 0.5, "short_sides": (800,), "max_size": 1333, "crop": False,
        "crop_short_sides": (400, 500, 600), "crop_range": (384, 600), "eval_short_side": 800,
        "eval_max_size": 1333, "pad_size_divisor": 32, "jitter_range": (0.1, 2.0),
    }),
    (TrainConfig, {
        "learning_rate": 2.5e-5, "weight_decay": 1e-4, "adam_epsilon": 1e-10, "clip_norm": 1.0,
        "warmup_steps": 500, "warmup_factor": 0.001, "milestones": (8, 11), "gamma": 0.1,
        "epochs": 12, "max_detections": 100, "ema_decay": 0.0, "nms_iou_threshold": None,
    }),
]  # fmt: skip


@pytest.mark.parametrize(("part", "expected"), PARTS)
def test_defaults_of_parts(part: Callable[..., object], expected: dict[str, Any]) -> None:
    parameters = inspect.signature(part).parameters
    assert {name: parameters[name].default for name in expected} == expected


@pytest.mark.parametrize("head", LOSSES)
def test_losses_and_costs_of_heads(head: str) -> None:
    loss = HEADS[head].model.loss_config
    expected = _ALL | LOSSES[head]
    assert {name: getattr(loss, name) for name in expected} == expected
    assert set(expected) | {
        "class_options", "class_divisor", "l1_divisor", "giou_divisor", "extra_losses",
    } == {entry.name for entry in fields(LossConfig)}  # fmt: skip
    config = HEADS[head].config()
    assert {name: getattr(config, name) for name in CONFIGS[head]} == CONFIGS[head]
    # the matching costs are 2 / 5 / 2 whatever the weight of the loss
    assert default_costs(loss) == (
        FocalClassCost(2.0, 0.25, 2.0, expected["log_epsilon"]),
        L1BoxCost(5.0, expected["l1_format"]),
        GIoUBoxCost(2.0, expected["giou_epsilon"]),
    )
