"""Detectors of transformers as `detrelay report` looks at them: the predictions of every stage.

Models of the DETR family pass the predictions of all decoder layers to their loss function. A
function in its place receives them, whatever the model's own code is like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.errors import one_line
from detrelay.core.hub.fetch import model_folder
from detrelay.core.structures import StageGroup, StagePrediction

UNKNOWN_CATEGORY = -1
_OWN_TYPES = "detrelay_"
_SMALLEST = 1e-9  # a probability, before its logarithm


class ShownStages(nn.Module):
    """The part that a recording watches: it gets all stages, its `classify` their features."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Identity()

    def forward(self, groups: tuple[StageGroup, ...]) -> tuple[StageGroup, ...]:
        """The stages as they are."""
        return groups


class ForeignDetector(nn.Module):
    """A transformers detector with the interface of one of this project.

    Its `head` is called with all stages and returns them; before that `head.classify` is called
    with the query features of each stage, if they are found: the input of the linear layer that
    computed the stage's scores. Scores of a softmax over classes and "no object" become those
    logits whose sigmoid is the same probability.

    Args:
        model: in transformers' DETR family.

    Raises:
        ValueError: when called, if the model does not expose its stages.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = ShownStages()
        self.config = model.config

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> None:
        """Call `head` with the stages of the images."""
        seen: list[tuple[Tensor, Tensor]] = []

        def look(
            logits: Tensor,
            _labels: Any,
            _device: Any,
            boxes: Tensor,
            _config: Any,
            all_logits: Tensor | None = None,
            all_boxes: Tensor | None = None,
            **_: Any,
        ) -> tuple[Tensor, dict[str, Tensor], None]:
            if all_logits is None or all_boxes is None:
                raise ValueError(f"a {type(self.model).__name__} shows no stage but the last")
            # some models stack stages before the batch, some after it
            places = [place for place in (0, 1) if _is_last(all_logits.unbind(place)[-1], logits)]
            if not places:
                raise ValueError(
                    f"a {type(self.model).__name__} shows stages of which none is its output"
                )
            unbound = (values.unbind(places[0]) for values in (all_logits, all_boxes))
            seen.extend(zip(*unbound, strict=True))
            return logits.sum(), {}, None

        self.model.loss_function = look
        nothing = {
            "class_labels": torch.zeros(0, dtype=torch.long, device=pixel_values.device),
            "boxes": torch.zeros(0, 4, device=pixel_values.device),
        }
        with self._calls_of_classifiers() as calls:
            self.model(
                pixel_values=pixel_values,
                pixel_mask=pixel_mask,
                labels=[nothing for _ in range(len(pixel_values))],
            )
        if not seen:
            raise ValueError(f"a {type(self.model).__name__} shows no stages")
        stages = tuple(
            StagePrediction(self._sigmoid_logits(logits.float()), boxes.float())
            for logits, boxes in seen
        )
        for features in _features_of([logits for logits, _ in seen], calls):
            self.head.classify(features)
        self.head((StageGroup("decoder", stages),))

    @contextmanager
    def _calls_of_classifiers(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Inputs and outputs of the linear layers with as many outputs as classes.

        A layer that serves all stages at once counts as called for each.
        """
        calls: list[tuple[Tensor, Tensor]] = []

        def keep(_module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            if made.ndim == 3:
                calls.append((given[0], made))
            elif made.ndim == 4:  # some models stack stages before the batch, some after it
                for place in (0, 1):
                    calls.extend(zip(given[0].unbind(place), made.unbind(place), strict=True))

        classes = self.config.num_labels
        handles = [
            module.register_forward_hook(keep)
            for module in self.model.modules()
            if isinstance(module, nn.Linear) and module.out_features in (classes, classes + 1)
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _sigmoid_logits(self, logits: Tensor) -> Tensor:
        if logits.shape[-1] == self.config.num_labels:
            return logits
        return logits.softmax(-1)[..., :-1].clamp(min=_SMALLEST).logit(eps=_SMALLEST)


def _features_of(stages: Sequence[Tensor], calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The inputs of each stage's scores [B, Q, K]; empty unless all are found."""
    found = []
    for logits in stages:
        fitting = [
            given
            for given, made in calls
            if made.shape == logits.shape and torch.allclose(made, logits, rtol=1e-4, atol=1e-5)
        ]
        found += fitting[-1:]
    return found if len(found) == len(stages) else []


def _is_last(stage: Tensor, output: Tensor) -> bool:
    """Whether a stage's scores are those of the output, up to rounding."""
    return stage.shape == output.shape and torch.allclose(stage, output, rtol=1e-3, atol=1e-3)


def is_foreign(source: Path) -> bool:
    """Whether a model folder, or a name on the Hub, belongs to another project."""
    file = model_folder(source) / "config.json"
    if not file.is_file():
        return False
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type", _OWN_TYPES)
    except (ValueError, AttributeError):
        return False
    return not str(kind).startswith(_OWN_TYPES)


def load_foreign(source: Path) -> tuple[ForeignDetector, Any]:
    """A detector of transformers and its image processor.

    Raises:
        ValueError: the folder does not contain one.
    """
    folder = model_folder(source)
    try:
        model = AutoModelForObjectDetection.from_pretrained(
            folder, trust_remote_code=False, use_safetensors=True, auxiliary_loss=True
        )
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{source}: cannot be loaded as a detector: {one_line(error)}") from error
    return ForeignDetector(model.eval()), processor


def foreign_categories(
    model: ForeignDetector, samples: AnnotatedImages, source: Path
) -> tuple[list[int], list[int]]:
    """Category id of the data by class index of the model, and class index by that of the data.

    Classes are matched by name; classes that the data lack get `UNKNOWN_CATEGORY`.

    Raises:
        ValueError: the model does not know a category of the data.
    """
    names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    class_names = [category.name for category in samples.categories]
    strange = [name for name in class_names if name not in names]
    if strange:
        raise ValueError(
            f"{source}: has no class named {strange[0]!r} ({len(strange)} of {len(class_names)} "
            f"categories of the data are unknown to it)"
        )
    ids = dict(zip(class_names, (category.id for category in samples.categories), strict=True))
    return [ids.get(name, UNKNOWN_CATEGORY) for name in names], [
        names.index(n) for n in class_names
    ]


def foreign_batches(
    samples: AnnotatedImages, processor: Any, indices: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One image at a time, prepared by the model's own processor, so that nothing is padded."""
    for index in indices:
        sample = samples[index]
        height, width = sample.image.shape[-2:]
        inputs = processor(images=sample.image, return_tensors="pt")
        pixels = inputs["pixel_values"]
        low, high = sample.boxes_xyxy.reshape(-1, 2, 2).unbind(1)
        boxes = torch.cat([(low + high) / 2, high - low], dim=1)
        label = {
            "class_labels": sample.class_labels,
            "boxes": boxes / torch.tensor([width, height, width, height]),
            "image_id": torch.tensor([sample.image_id]),
            "orig_size": torch.tensor([height, width]),
        }
        mask = inputs.get("pixel_mask", torch.ones(1, *pixels.shape[-2:], dtype=torch.long))
        yield {"pixel_values": pixels, "pixel_mask": mask, "labels": [label]}
