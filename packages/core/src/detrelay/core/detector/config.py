"""The configuration shared by all detectors."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict, type_validator
from transformers import PreTrainedConfig

from detrelay.core.backbones import RESNETS, SWINS, find_backbone_class
from detrelay.core.errors import nearest
from detrelay.core.structures import REGIONS, GroupFacts

# Keys that transformers itself writes into or reads from config.json without a typed field.
_LIBRARY_KEYS = frozenset(
    {
        "num_labels",
        "attn_implementation",
        "experts_implementation",
        "output_attentions",
        "torch_dtype",
        "name_or_path",
        "model_type",
        "auto_map",
        "quantization_config",
        "per_layer_config",
    }
)
_LARGEST_SIZE = 100_000  # of queries, layers, channels; no machine holds more
_COCO_CLASSES = 80


@strict
class DetectorConfig(PreTrainedConfig):
    """Configuration that all heads share. Holds only what changes weights or inference.

    Unknown keys are rejected with the closest known name: transformers would keep a misspelled
    option as a silent attribute.

    Attributes:
        backbone_name: one of `BACKBONES`: ResNets, ResNeXt-101 with and without deformable
            convolutions ("_dcn"), Swin transformers, "efficientnet_lite0" (its five stages begin at
            stride 2); "transformers/MODEL_TYPE" for any backbone of transformers; "timm/NAME" for
            any network of timm; `module:Class` for a custom one.
        backbone_options: fields of the config of a backbone of transformers, arguments of
            `timm.create_model`, or options of a custom backbone; others have none.
        backbone_norm: "frozen" (statistics and affine parameters fixed), "eval" (statistics fixed,
            affine parameters trained) or "train" (ordinary batch norm, for training from scratch).
            Swin transformers have no batch norm.
        backbone_frozen_stages: how many stages are frozen, including the stem; 0 trains everything.
        backbone_drop_path: stochastic depth: chance in training that a Swin transformer's last
            block is skipped, rising linearly from 0 at its first; ResNets have none.
        classify_regions: in training, also classify each annotated box from the backbone's maps,
            stage group "regions"; see `RegionClassifier`.
        category_ids: the dataset's own id of each class index, restored when results are written;
            None if unknown.

    Raises:
        ValueError: an unknown key, a gap in `id2label`, or a value out of range.
        TypeError: a value of another type.
    """

    model_type = "detrelay_detector"
    # transformers' trainer gathers the other outputs, which have one row per image
    keys_to_ignore_at_inference = ["loss_dict", "auxiliary_outputs"]  # noqa: RUF012 - as the base
    # settings of tasks that a saved model no longer has to do: a recipe may add them to it
    only_in_training = frozenset({"classify_regions"})

    backbone_name: str = "resnet50"
    backbone_options: dict[str, Any] | None = None
    backbone_norm: Literal["frozen", "eval", "train"] = "eval"
    backbone_frozen_stages: int = 1
    backbone_drop_path: float | int = 0.0
    classify_regions: bool = False
    category_ids: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in fields(self)}
        for key in kwargs:
            if key not in _LIBRARY_KEYS and not key.startswith("_"):
                hint = nearest(key, known, repr)
                raise ValueError(f"{type(self).__name__} has no option {key!r}; {hint}")
        if self.id2label is None:
            kwargs.setdefault("num_labels", _COCO_CLASSES)
        self._check_types()
        super().__post_init__(**kwargs)
        labels = sorted(int(index) for index in self.id2label or {})
        if labels != list(range(len(labels))):
            raise ValueError(f"id2label must name the classes 0..{len(labels) - 1}; found {labels}")
        if self.category_ids is not None and len(self.category_ids) != len(labels):
            raise ValueError(
                f"category_ids must hold one id per class ({len(labels)}); "
                f"found {len(self.category_ids)}"
            )

    @property
    def class_names(self) -> list[str]:
        """Name of each class index."""
        return list((self.id2label or {}).values())

    def stage_groups(self) -> tuple[GroupFacts, ...] | None:
        """The stage groups that the head returns in training, as declared by this config.

        None if a head declares none; then only the first step shows whether each group can be
        assigned.
        """
        return None

    def training_groups(self) -> tuple[GroupFacts, ...] | None:
        """The stage groups of head and detector in training; None if the head declares none."""
        groups = self.stage_groups()
        if groups is None or not self.classify_regions:
            return groups
        return (*groups, REGIONS)

    def _check_types(self) -> None:
        # `strict` skips annotations that are stored as text, as they are in these modules
        for kind in reversed(type(self).__mro__):
            if issubclass(kind, DetectorConfig):
                for name, expected in inspect.get_annotations(kind, eval_str=True).items():
                    type_validator(name, getattr(self, name), expected)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; changing the classes drops the ids of the old ones.

        So a checkpoint can be loaded with the `num_labels` or `id2label` of other data.
        """
        before = self.__dict__.get("id2label")
        super().__setattr__(name, value)
        if name == "id2label" and before and list(before.values()) != list(value.values()):
            self.category_ids = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the code of a model stays in its package and is not saved with it."""

    def validate_architecture(self) -> None:
        """Reject values that no model can be built from."""
        try:
            find_backbone_class(self.backbone_name)
        except ValueError as error:
            raise ValueError(f"backbone_name: {error}") from error
        if self.backbone_drop_path and self.backbone_name not in SWINS:
            raise ValueError(
                f"backbone_drop_path is for Swin transformers; {self.backbone_name} has none"
            )
        if not 0 <= self.backbone_drop_path < 1:
            raise ValueError(
                f"backbone_drop_path must lie in [0, 1); found {self.backbone_drop_path}"
            )
        is_own = self.backbone_name in (*RESNETS, *SWINS)  # others are checked when they are built
        if self.backbone_frozen_stages < 0 or (is_own and self.backbone_frozen_stages > 4):
            raise ValueError(
                f"backbone_frozen_stages must lie in 0..4; found {self.backbone_frozen_stages}"
            )


def require_positive(config: PreTrainedConfig, *names: str) -> None:
    """Reject a config in which one of the named integers is below 1 or absurdly large."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; found {getattr(config, name)}")
        if getattr(config, name) > _LARGEST_SIZE:
            raise ValueError(
                f"{name} must be at most {_LARGEST_SIZE}; found {getattr(config, name)}"
            )
