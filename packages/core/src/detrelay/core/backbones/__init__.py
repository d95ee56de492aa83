"""Backbones by name: the one place where a new one is registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from detrelay.core.backbones.base import Backbone, BackboneNorm, BackboneSettings
from detrelay.core.backbones.efficientnet_lite import (
    EFFICIENTNET_LITE0,
    EfficientNetLiteBackbone,
)
from detrelay.core.backbones.resnet import RESNETS, ResNetBackbone
from detrelay.core.backbones.swin import SWINS, SwinBackbone
from detrelay.core.backbones.timm_models import TimmBackbone
from detrelay.core.backbones.transformers_models import TransformersBackbone
from detrelay.core.errors import unknown_name
from detrelay.core.registry import find_part

__all__ = [
    "BACKBONES",
    "RESNETS",
    "SWINS",
    "Backbone",
    "BackboneSettings",
    "ResNetBackbone",
    "SwinBackbone",
    "build_backbone",
    "find_backbone_class",
]


def _resnet(name: str, settings: BackboneSettings) -> Backbone:
    _refuse_options(name, settings)
    return ResNetBackbone(
        name, settings.norm, settings.frozen_stages, settings.num_stages, settings.num_maps
    )


def _swin(name: str, settings: BackboneSettings) -> Backbone:
    _refuse_options(name, settings)
    return SwinBackbone(
        name,
        settings.frozen_stages,
        settings.num_stages,
        settings.num_maps,
        settings.drop_path,
    )


def _refuse_options(name: str, settings: BackboneSettings) -> None:
    if settings.options:
        raise ValueError(f"backbone {name} has no options; found {dict(settings.options)}")


# an entry that ends with a slash covers all names that begin with it
BACKBONES: dict[str, Callable[[str, BackboneSettings], Backbone]] = {
    **dict.fromkeys(RESNETS, _resnet),
    **dict.fromkeys(SWINS, _swin),
    EFFICIENTNET_LITE0: EfficientNetLiteBackbone,
    "transformers/": TransformersBackbone,
    "timm/": TimmBackbone,
}


def find_backbone_class(name: str) -> Callable[[str, BackboneSettings], Backbone]:
    """The constructor of the backbone of that name.

    Args:
        name: a key of `BACKBONES`; a name after one that ends with a slash, as in
            "transformers/convnext"; or `module:Class` for a custom `Backbone`.

    Raises:
        ValueError: there is no such backbone.
    """
    if ":" in name:
        return find_part("backbone", name, {})
    library, slash, model = name.partition("/")
    key = library + slash if model else name
    if key not in BACKBONES:
        raise ValueError(unknown_name("backbone", name, BACKBONES))
    return BACKBONES[key]


def build_backbone(
    name: str,
    norm: BackboneNorm,
    frozen_stages: int,
    num_stages: int = 4,
    num_maps: int | None = None,
    drop_path: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """A backbone with random weights.

    Args:
        name: see `find_backbone_class`.
        norm: see `BackboneSettings`.
        frozen_stages: number of stages that are not trained, including the stem.
        num_stages: how many stages there are; fewer than four omit the last ones.
        num_maps: how many maps are returned, counted from the last stage; None for all.
        drop_path: see `SwinBackbone`; ResNets have none.
        options: backbone-specific arguments.

    Raises:
        ValueError: there is no such backbone, or it rejects its settings.
    """
    settings = BackboneSettings(norm, frozen_stages, num_stages, num_maps, drop_path, options or {})
    return find_backbone_class(name)(name, settings)
