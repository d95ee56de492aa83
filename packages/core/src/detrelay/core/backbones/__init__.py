"""Backbones by name: images to feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from detrelay.core.backbones.base import Backbone, BackboneNorm
from detrelay.core.backbones.resnet import RESNETS, ResNetBackbone
from detrelay.core.backbones.swin import SWINS, SwinBackbone

__all__ = [
    "BACKBONES",
    "RESNETS",
    "SWINS",
    "Backbone",
    "ResNetBackbone",
    "SwinBackbone",
    "build_backbone",
]

BACKBONES = (*RESNETS, *SWINS)


def build_backbone(
    name: str,
    norm: BackboneNorm,
    frozen_stages: int,
    num_stages: int = 4,
    num_maps: int | None = None,
    drop_path: float = 0.0,
) -> Backbone:
    """A backbone of `BACKBONES` with random weights.

    Args:
        name: which one.
        norm: "frozen", "eval" or "train", see `DetectorConfig`.
        frozen_stages: number of stages that are not trained, the stem with them.
        num_stages: how many stages there are; fewer than four leave the last ones out.
        num_maps: how many maps are returned, counted from the last stage; None for all.
        drop_path: see `SwinBackbone`; ResNets have none.
    """
    if name in SWINS:
        return SwinBackbone(name, frozen_stages, num_stages, num_maps, drop_path)
    return ResNetBackbone(name, norm, frozen_stages, num_stages, num_maps)
