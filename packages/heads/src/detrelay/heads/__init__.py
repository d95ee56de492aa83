"""Heads by name: the one place where a new one is entered. Importing registers the Auto classes."""

from __future__ import annotations

from typing import NamedTuple

from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from detrelay.core.detector import DetectorForObjectDetection
from detrelay.core.detector_config import DetectorConfig
from detrelay.core.image_processing import DetrelayImageProcessor
from detrelay.heads.deformable_detr import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
)
from detrelay.heads.dino import DinoConfig, DinoForObjectDetection
from detrelay.heads.dn_detr import DnDetrConfig, DnDetrForObjectDetection
from detrelay.heads.stageinteractor import StageInteractorConfig, StageInteractorForObjectDetection


class HeadEntry(NamedTuple):
    """What a head's name stands for.

    Attributes:
        config: its configuration class.
        model: its model class.
        assigner: name of the assigner it was published with.
    """

    config: type[DetectorConfig]
    model: type[DetectorForObjectDetection]
    assigner: str


HEADS: dict[str, HeadEntry] = {
    "stageinteractor": HeadEntry(
        StageInteractorConfig, StageInteractorForObjectDetection, "cross_stage"
    ),
    "deformable_detr": HeadEntry(
        DeformableDetrConfig, DeformableDetrForObjectDetection, "hungarian"
    ),
    "dn_detr": HeadEntry(DnDetrConfig, DnDetrForObjectDetection, "hungarian"),
    "dino": HeadEntry(DinoConfig, DinoForObjectDetection, "hungarian"),
}

for _entry in HEADS.values():
    AutoConfig.register(_entry.config.model_type, _entry.config, exist_ok=True)
    AutoModelForObjectDetection.register(_entry.config, _entry.model, exist_ok=True)
    AutoImageProcessor.register(
        _entry.config,
        image_processor_classes={"torchvision": DetrelayImageProcessor},
        exist_ok=True,
    )
    # the pipeline looks names up here before it believes that a model can detect objects
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES.setdefault(
        _entry.config.model_type, _entry.model.__name__
    )
