"""The base of all detectors: backbone -> pyramid -> head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from detrelay.core.backbones import Backbone, build_backbone
from detrelay.core.backbones.weights import load_backbone_weights
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.detector.pyramid import build_pyramid
from detrelay.core.losses import LossConfig
from detrelay.core.structures import StageGroup, Targets


@dataclass
class DetectorOutput(ModelOutput):
    """What a detector returns.

    Attributes:
        logits: float [B, Q, K], class scores of the last decoder stage before the sigmoid.
        pred_boxes: float [B, Q, 4], its boxes, cxcywh in [0, 1] of the unpadded image, unclipped.
        groups: every stage for the criterion, the decoder's group first; None in evaluation.
    """

    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    groups: tuple[StageGroup, ...] | None = None


class DetectorForObjectDetection(PreTrainedModel):
    """A query-based detector. Subclasses set `backbone`, `neck` and `head`, then `post_init()`.

    The model makes predictions only; losses are the business of `Criterion`.

    Attributes:
        loss_config: the numbers of the head's published training loss.
    """

    config: DetectorConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    input_modalities = "image"
    loss_config: ClassVar[LossConfig] = LossConfig()

    backbone: Backbone
    neck: nn.Module
    head: nn.Module

    @property
    def level_strides(self) -> tuple[int, ...]:
        """Strides in pixels of the levels that the neck makes; the backbone's own by default."""
        return self.backbone.strides

    def build_backbone(self, num_stages: int = 4, num_maps: int | None = None) -> Backbone:
        """The backbone that the config names, with random weights, see `build_backbone`."""
        config = self.config
        return build_backbone(
            config.backbone_name,
            config.backbone_norm,
            config.backbone_frozen_stages,
            num_stages,
            num_maps,
            config.backbone_drop_path,
        )

    def load_backbone_weights(self, source: str) -> None:
        """Fill the backbone with pre-trained weights, see `load_backbone_weights`."""
        load_backbone_weights(self.backbone, source)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module by its own rule; children come before their parents.

        transformers calls this for missing weights too, and guards `torch.nn.init` so that
        weights which were loaded stay as they are.
        """
        if isinstance(module, nn.BatchNorm2d):
            # its own rule would wipe statistics that were loaded
            super()._init_weights(module)
            return
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers the base skips modules without parameters of their own,
        # so the rules of containers would never run.
        super()._initialize_weights(module, is_custom_code=False)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        targets: Targets | None = None,
    ) -> DetectorOutput:
        """Detect objects.

        Args:
            pixel_values: float [B, 3, H, W], normalised, padded bottom and right.
            pixel_mask: int or bool [B, H, W], 1 on real pixels; all real if None.
            targets: objects of the batch; read in training by heads that denoise.

        Returns:
            `groups` is set in training mode only.
        """
        if pixel_mask is None:
            batch, _, height, width = pixel_values.shape
            pixel_mask = pixel_values.new_ones((batch, height, width), dtype=torch.bool)
        levels = self.neck(self.backbone(pixel_values))
        pyramid = build_pyramid(levels, self.level_strides, pixel_mask)
        groups = self.head(pyramid, targets if self.training else None)
        last = groups[0].stages[-1]
        return DetectorOutput(
            logits=last.logits,
            pred_boxes=last.boxes,
            groups=groups if self.training else None,
        )
