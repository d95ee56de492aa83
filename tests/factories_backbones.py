"""Small backbones of every kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detrelay.core.backbones import Backbone
from detrelay.core.backbones.swin import SwinSizes
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.heads import HEADS
from factories import small_head_config

SMALL_SWIN = SwinSizes(16, (2, 1, 2, 1), (1, 2, 2, 4), 4)
SWIN_IMAGE = (2, 3, 148, 188)  # odd numbers of patches
_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# options of small networks, channels and strides of their maps
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[float, ...]]] = {
    "resnet": (
        "transformers/resnet",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        (8, 16, 24, 32),
        (4, 8, 16, 32),
    ),
    "convnext": (
        "transformers/convnext",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        (8, 16, 24, 32),
        (4, 8, 16, 32),
    ),
    "swin": (
        "transformers/swin",
        {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "window_size": 4},
        (8, 16, 32, 64),
        (4, 8, 16, 32),
    ),
    "dinov2": (
        "transformers/dinov2",
        {**_VIT, "patch_size": 14},
        (8, 16, 32, 32),
        (3.5, 7, 14, 28),
    ),
    "dinov3": (
        "transformers/dinov3_vit",
        {**_VIT, "intermediate_size": 48, "patch_size": 16},
        (8, 16, 32, 32),
        (4, 8, 16, 32),
    ),
    "timm_resnet": ("timm/resnet10t", {}, (64, 128, 256, 512), (4, 8, 16, 32)),
    "timm_vit": (
        "timm/vit_tiny_patch16_224",
        {"depth": 2, "embed_dim": 32, "num_heads": 2},
        (8, 16, 32, 32),
        (4, 8, 16, 32),
    ),
    "timm_swin": (
        "timm/swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
        (8, 16, 32, 64),
        (4, 8, 16, 32),
    ),
}


def make_model(
    case: str, head: str = "stageinteractor", **changes: Any
) -> DetectorForObjectDetection:
    """A small head on a backbone of `CASES`."""
    name, options, _, _ = CASES[case]
    torch.manual_seed(0)
    changes = {"backbone_name": name, "backbone_options": options, **changes}
    return HEADS[head].model(small_head_config(head, **changes))


def maps_of(backbone: Backbone, image: Tensor) -> tuple[Tensor, ...]:
    """Its feature maps in evaluation."""
    with torch.no_grad():
        return backbone.eval()(image)
