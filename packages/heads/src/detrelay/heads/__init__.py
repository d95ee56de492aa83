"""Heads by name: the one place to register a new one. Importing registers the Auto classes."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.pipeline import register_pipeline
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.errors import unknown_name
from detrelay.core.registry import import_module
from detrelay.heads.deformable.detr import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
)
from detrelay.heads.deformable.dino import DinoConfig, DinoForObjectDetection
from detrelay.heads.deformable.dn_detr import DnDetrConfig, DnDetrForObjectDetection
from detrelay.heads.stageinteractor.config import StageInteractorConfig
from detrelay.heads.stageinteractor.head import StageInteractorForObjectDetection


class HeadEntry(NamedTuple):
    """What a head's name stands for.

    Attributes:
        config: its configuration class.
        model: its model class.
    """

    config: type[DetectorConfig]
    model: type[DetectorForObjectDetection]

    @property
    def assigner(self) -> str:
        """Name of the assigner it was published with."""
        return self.model.assigner


HEADS: dict[str, HeadEntry] = {
    "stageinteractor": HeadEntry(StageInteractorConfig, StageInteractorForObjectDetection),
    "deformable_detr": HeadEntry(DeformableDetrConfig, DeformableDetrForObjectDetection),
    "dn_detr": HeadEntry(DnDetrConfig, DnDetrForObjectDetection),
    "dino": HeadEntry(DinoConfig, DinoForObjectDetection),
}


def register(entry: HeadEntry) -> None:
    """Let the Auto classes and the pipeline find a head."""
    AutoConfig.register(entry.config.model_type, entry.config, exist_ok=True)
    AutoModelForObjectDetection.register(entry.config, entry.model, exist_ok=True)
    AutoImageProcessor.register(
        entry.config,
        image_processor_classes={"torchvision": DetrelayImageProcessor},
        exist_ok=True,
    )
    # the pipeline accepts a model for object detection only if its name is listed here
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(
        entry.config.model_type, entry.model.__name__
    )


def find_head(name: str) -> HeadEntry:
    """The head of that name, or a custom one defined elsewhere.

    Args:
        name: a key of `HEADS`, or `package.module:ConfigClass` of a head outside this package,
            whose module also holds the model class of that config and may be in the working
            directory. It is trained with the assigner that its model class names, by default the
            Hungarian one.

    Raises:
        ValueError: there is no such head.
    """
    module_name, colon, config_name = name.partition(":")
    if not colon:
        if name not in HEADS:
            raise ValueError(unknown_name("head", name, HEADS))
        return HEADS[name]
    module = import_module("head", name, module_name)
    config = getattr(module, config_name, None)
    if not (isinstance(config, type) and issubclass(config, DetectorConfig)):
        raise ValueError(f"head {name!r}: {module_name} has no DetectorConfig {config_name!r}")
    models = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, DetectorForObjectDetection)
        and vars(value).get("config_class") is config
    ]
    if not models:
        raise ValueError(
            f"head {name!r}: {module_name} has no DetectorForObjectDetection whose config_class "
            f"is {config_name}"
        )
    entry = HeadEntry(config, models[0])
    register(entry)
    return entry


register_pipeline()
for _entry in HEADS.values():
    register(_entry)
