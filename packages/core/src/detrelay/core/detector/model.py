"""The base of all detectors: backbone -> pyramid -> head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from detrelay.core.backbones import Backbone, build_backbone
from detrelay.core.backbones.weights import load_backbone_weights
from detrelay.core.detector.checkpointing import set_checkpointing
from detrelay.core.detector.checks import check_input, check_targets
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.detector.loss import LossFunction, published_criterion
from detrelay.core.detector.pyramid import build_pyramid, pad_to
from detrelay.core.detector.regions import RegionClassifier
from detrelay.core.losses import LossConfig
from detrelay.core.structures import FeaturePyramid, StageGroup, Targets


@dataclass
class DetectorOutput(ModelOutput):
    """What a detector returns.

    Attributes:
        loss: scalar, the weighted loss; None without labels.
        loss_dict: unweighted losses by key, such as "decoder/5/giou"; None without labels.
        logits: float [B, Q, K], class scores of the last decoder stage before the sigmoid.
        pred_boxes: float [B, Q, 4], its boxes, cxcywh in [0, 1] of the unpadded image, unclipped.
        auxiliary_outputs: `logits` and `pred_boxes` of the earlier decoder stages, first stage
            first; None unless requested.
        groups: all stages for a criterion, the decoder's group first; set in training without
            labels.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    groups: tuple[StageGroup, ...] | None = None


class DetectorForObjectDetection(PreTrainedModel):
    """A query-based detector. Subclasses set `backbone`, `neck` and `head`, then `post_init()`.

    The model makes predictions; losses are computed by `loss_function`, which runs when the model
    is called with labels.

    Attributes:
        loss_config: the numbers of the head's published training loss.
        assigner: name of the assigner that the head was published with.
        assigner_options: by name of an assigner, its default options on this head.
        object_scores: prefixes of the names of class scores whose entry 0 says "object" of any
            class.
    """

    config: DetectorConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    loss_config: ClassVar[LossConfig] = LossConfig()
    assigner: ClassVar[str] = "hungarian"
    object_scores: ClassVar[tuple[str, ...]] = ()
    assigner_options: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    backbone: Backbone
    neck: nn.Module
    head: nn.Module
    regions: RegionClassifier | None
    _criterion: LossFunction | None = None

    @property
    def level_strides(self) -> tuple[float, ...]:
        """Strides in pixels of the neck's levels; by default the backbone's."""
        return self.backbone.strides

    @property
    def loss_function(self) -> LossFunction:
        """The criterion for calls with labels; the published one unless another was set."""
        if self._criterion is None:
            self._criterion = published_criterion(self.loss_config, self.assigner)
        return self._criterion

    @loss_function.setter
    def loss_function(self, value: LossFunction) -> None:
        object.__setattr__(self, "_criterion", value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a loss function that is a module does not become part of the model.

        torch would register it as a submodule, where the property does not look.
        """
        if name == "loss_function":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def post_init(self) -> None:
        """Add what all detectors may have besides backbone, neck and head, and draw the weights."""
        self.regions = None
        if self.config.classify_regions:
            self.regions = RegionClassifier(self.backbone.channels, self.config.num_labels or 0)
        super().post_init()

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
            config.backbone_options,
        )

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Load a saved model, see transformers; what the config freezes is frozen again.

        transformers replaces the parameters it loads by new ones, all of them trainable.
        """
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        cast(DetectorForObjectDetection, model).backbone.freeze()
        return loaded

    def push_to_hub(self, repo_id: str, **options: Any) -> str:  # type: ignore[override]
        """Publish the model as `detrelay publish` does: card, processor, one commit, release test.

        Args:
            repo_id: "user/model", or "model" for the owner of the token.
            **options: `processor`, `training`, `private`, `token`, `tag`, `license`,
                `commit_message`; see `detrelay.core.hub.push.push_model`.

        Returns:
            The address of its page.

        Raises:
            HubError: in one line: what is wrong and whether anything was published.
        """
        from detrelay.core.hub.push import push_model  # it imports this module

        return push_model(self, repo_id, **options).url

    def backbone_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Maps [B, C, h, w] that the backbone makes of [B, 3, H, W], finest first.

        Images are padded to the backbone's divisor and taken in the dtype of the weights.
        """
        return self.backbone(pad_to(self.backbone.divisor, pixel_values).to(self.dtype))

    def load_backbone_weights(self, source: str) -> None:
        """Fill the backbone with pre-trained weights, see `load_backbone_weights`."""
        load_backbone_weights(self.backbone, source)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module by its own rule; children come before parents.

        transformers calls this for missing weights too, and guards `torch.nn.init` so that
        weights which were loaded stay as they are.
        """
        if isinstance(module, nn.BatchNorm2d):
            # its own rule would overwrite loaded statistics
            super()._init_weights(module)
            return
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside transformers the base skips modules without parameters of their own,
        # so the rules of containers would never run.
        super()._initialize_weights(module, is_custom_code=False)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        set_checkpointing(self, gradient_checkpointing_func if enable else None, every_n_layers)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        targets: Targets | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        output_auxiliary: bool = False,
        feature_maps: Sequence[Tensor] | None = None,
    ) -> DetectorOutput:
        """Detect objects.

        Args:
            pixel_values: float [B, 3, H, W], normalised, padded bottom and right; taken in the
                dtype of the weights.
            pixel_mask: int or bool [B, H, W], 1 on real pixels; all real if None.
            targets: objects of the batch; read in training by heads that denoise.
            labels: the same in transformers' format, for a loss by `loss_function`: one mapping per
                image with `class_labels` int64 [n] and `boxes` float [n, 4], cxcywh in [0, 1] of
                the unpadded image.
            output_auxiliary: also return what the decoder stages before the last predict.
            feature_maps: in place of `pixel_values`, what `backbone_maps` has made of them; then
                `pixel_mask` is needed.

        Raises:
            TypeError: pixels that are not floating point.
            ValueError: shapes that do not fit together, an image without a real pixel, invalid
                targets, or objects in both formats.
        """
        pixel_mask = _checked_mask(pixel_values, pixel_mask, feature_maps)
        if labels is not None:
            if targets is not None:
                raise ValueError("objects are given twice, as targets and as labels; pass only one")
            targets = Targets.from_labels(labels).to(pixel_mask.device)
        if targets is not None:
            check_targets(targets, len(pixel_mask), self.config.num_labels or 0)
        if pixel_values is not None and feature_maps is None:
            feature_maps = self.backbone_maps(pixel_values)
        assert feature_maps is not None  # given or just made
        levels = self.neck(feature_maps)
        pixel_mask = pad_to(self.backbone.divisor, pixel_mask)
        pyramid = build_pyramid(levels, self.level_strides, pixel_mask)
        learned = targets if self.training else None
        regions = self._regions(feature_maps, pyramid, learned)
        groups = (*self.head(pyramid, learned), *regions)
        *before, last = groups[0].stages
        loss, losses = None, None
        if labels is not None:
            loss, losses = self._loss(groups, targets, labels)
        return DetectorOutput(
            loss=loss,
            loss_dict=losses,
            logits=last.logits,
            pred_boxes=last.boxes,
            auxiliary_outputs=[
                {"logits": stage.logits, "pred_boxes": stage.boxes} for stage in before
            ]
            if output_auxiliary
            else None,
            groups=groups if self.training and labels is None else None,
        )

    def _regions(
        self, maps: Sequence[Tensor], pyramid: FeaturePyramid, targets: Targets | None
    ) -> tuple[StageGroup, ...]:
        """The group of annotated boxes, where there are objects to learn and they are wanted."""
        if self.regions is None or targets is None:
            return ()
        return (self.regions(maps, self.backbone.strides, targets, pyramid.image_sizes),)

    def _loss(
        self,
        groups: tuple[StageGroup, ...],
        targets: Targets | None,
        labels: Sequence[Mapping[str, Tensor]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert targets is not None  # made from the labels
        known = all("image_id" in label for label in labels)
        image_ids = None
        if known:  # one transfer: each separate read would wait for the device
            ids = [torch.as_tensor(label["image_id"]).reshape(-1) for label in labels]
            image_ids = torch.cat(ids).tolist()
        # losses are computed in full precision, whatever precision the model runs in
        with torch.autocast(groups[0].stages[0].logits.device.type, enabled=False):
            result = self.loss_function(groups, targets, image_ids)
        return result.total, result.losses


def _checked_mask(
    pixel_values: Tensor | None, pixel_mask: Tensor | None, feature_maps: Sequence[Tensor] | None
) -> Tensor:
    """The mask of the images, after a check that pixels or maps can be used."""
    if feature_maps is not None:
        if pixel_mask is None:
            raise ValueError("feature_maps need the pixel_mask of their images")
        return pixel_mask
    if pixel_values is None:
        raise ValueError("expected pixel_values, or feature_maps with their pixel_mask")
    check_input(pixel_values, pixel_mask)
    if pixel_mask is not None:
        return pixel_mask
    batch, _, height, width = pixel_values.shape
    return pixel_values.new_ones((batch, height, width), dtype=torch.bool)
