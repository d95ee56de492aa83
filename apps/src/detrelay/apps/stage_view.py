"""An image as each decoder stage of a detector sees it: its boxes, and the labels it learns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detrelay.apps.detector import Found
from detrelay.apps.drawing import draw_boxes
from detrelay.core.boxes import cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from detrelay.core.criterion import Assigner
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorForObjectDetection, DetectorOutput
from detrelay.core.structures import Assignment, StagePrediction, Targets

_MOST_DETECTIONS = 100


@dataclass(frozen=True)
class Objects:
    """The ground truth of an image.

    Attributes:
        boxes_xyxy: float [n, 4], pixels.
        labels: int64 [n], class indices of the model.
    """

    boxes_xyxy: Tensor
    labels: Tensor


@dataclass(frozen=True)
class StageView:
    """The predictions of all stages for an image.

    Attributes:
        pixels: uint8 [3, H, W].
        stages: S predictions of a batch of one, on the CPU, row q for query q in all of them.
        objects: the ground truth; None if unknown.
        own: S assignments of each stage's own matching; empty without objects.
        learned: S assignments of the assigner that lends labels; empty without objects.
    """

    pixels: Tensor
    stages: tuple[StagePrediction, ...]
    objects: Objects | None = None
    own: tuple[Assignment, ...] = ()
    learned: tuple[Assignment, ...] = ()


@dataclass(frozen=True)
class LearnedLabel:
    """A class label that a query learns in a stage.

    Attributes:
        query: index of the query.
        target: row of the object.
        origin: the nearest stage, from 0, whose own matching has the pair; None if none has.
        iou: of the query's box in this stage and the object.
    """

    query: int
    target: int
    origin: int | None
    iou: float


@torch.no_grad()
def look_at(
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    pixels: Tensor,
    objects: Objects | None = None,
    assigners: tuple[Assigner, Assigner] | None = None,
) -> StageView:
    """Run a model over an image and keep all of its stages.

    Args:
        model: in evaluation mode.
        processor: the model's.
        pixels: uint8 [3, H, W].
        objects: the ground truth, for the labels.
        assigners: the stages' own matching, and the one that lends labels; needed with objects.
    """
    groups: list[Any] = []
    handle = model.head.register_forward_hook(lambda _, __, output: groups.append(output))
    try:
        model(**processor(images=pixels, return_tensors="pt").to(model.device))
    finally:
        handle.remove()
    stages = tuple(_on_cpu(stage) for stage in groups[0][0].stages)
    if objects is None or assigners is None:
        return StageView(pixels, stages)
    height, width = pixels.shape[-2:]
    scale = torch.tensor([width, height, width, height])
    targets = Targets.from_labels(
        [{"class_labels": objects.labels, "boxes": xyxy_to_cxcywh(objects.boxes_xyxy / scale)}]
    )
    own, learned = (tuple(assigner(stages, targets)) for assigner in assigners)
    return StageView(pixels, stages, objects, own, learned)


def _on_cpu(stage: StagePrediction) -> StagePrediction:
    stage = stage.by_slot().float()
    references = None if stage.references is None else stage.references.cpu()
    return StagePrediction(stage.logits.cpu(), stage.boxes.cpu(), references)


def detections(
    view: StageView,
    stage: int,
    processor: DetrelayImageProcessor,
    threshold: float,
    nms_iou_threshold: float | None,
) -> Found:
    """What would be detected if the decoder ended with a stage, counted from 0."""
    chosen = copy.copy(processor)
    chosen.nms_iou_threshold = nms_iou_threshold
    output: Any = DetectorOutput(
        logits=view.stages[stage].logits, pred_boxes=view.stages[stage].boxes
    )
    size = [(view.pixels.shape[-2], view.pixels.shape[-1])]
    return chosen.post_process_object_detection(output, threshold, size, _MOST_DETECTIONS)[0]


def learned_labels(view: StageView, stage: int) -> list[LearnedLabel]:
    """The labels that queries learn in a stage: its own, then those from other stages."""
    if view.objects is None:
        return []
    own = [_pairs(assignment) for assignment in view.own]
    nearest = sorted(range(len(own)), key=lambda other: (abs(other - stage), other))
    boxes = _boxes_xyxy(view, stage)
    labels = []
    for query, target in sorted(_pairs(view.learned[stage])):
        pair = (query, target)
        origin = next((other for other in nearest if pair in own[other]), None)
        fit = iou(boxes[query], view.objects.boxes_xyxy[target])
        labels.append(LearnedLabel(query, target, origin, float(fit)))
    return sorted(labels, key=lambda label: (label.origin != stage, label.target, label.query))


def draw_detections(view: StageView, found: Found, names: Sequence[str]) -> Tensor:
    """The image [3, H', W'] with what a stage detects."""
    classes = found["labels"].tolist()
    scores = found["scores"].tolist()
    captions = [f"{names[c]} {s:.2f}" for c, s in zip(classes, scores, strict=True)]
    return draw_boxes(view.pixels, found["boxes"], classes, captions)


def draw_labels(
    view: StageView, stage: int, labels: Sequence[LearnedLabel], names: Sequence[str]
) -> Tensor:
    """The image with the boxes of queries that learn a label.

    Solid if the stage's own matching gives the label; dashed if it came from another stage, which
    is named in the caption, counted from 1. Objects have a thin white outline.
    """
    assert view.objects is not None
    boxes = _boxes_xyxy(view, stage)
    travelled = [label.origin != stage for label in labels]
    classes = [int(view.objects.labels[label.target]) for label in labels]
    captions = [
        f"{names[index]} from {_stage_name(label.origin)}" if far else names[index]
        for index, label, far in zip(classes, labels, travelled, strict=True)
    ]
    shown = boxes[[label.query for label in labels]].reshape(-1, 4)
    return draw_boxes(
        view.pixels,
        shown,
        classes,
        captions,
        dashed=travelled,
        outlines=view.objects.boxes_xyxy,
    )


def _stage_name(origin: int | None) -> str:
    return "no stage" if origin is None else f"stage {origin + 1}"


def label_rows(
    view: StageView, stage: int, labels: Sequence[LearnedLabel], names: Sequence[str]
) -> list[list[str | int | float]]:
    """A row per label: query, object, class, origin, IoU."""
    assert view.objects is not None
    return [
        [
            label.query,
            label.target + 1,
            names[int(view.objects.labels[label.target])],
            "own" if label.origin == stage else _stage_name(label.origin),
            round(label.iou, 2),
        ]
        for label in labels
    ]


def _pairs(assignment: Assignment) -> set[tuple[int, int]]:
    pairs = assignment.classes
    return set(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True))


def _boxes_xyxy(view: StageView, stage: int) -> Tensor:
    """The boxes [Q, 4] of all queries in a stage, pixels, clipped to the image."""
    height, width = view.pixels.shape[-2:]
    boxes = cxcywh_to_xyxy(view.stages[stage].boxes[0]).clamp(0, 1)
    return boxes * torch.tensor([width, height, width, height])
