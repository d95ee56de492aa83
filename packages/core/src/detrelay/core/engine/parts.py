"""The inputs of a run and the results of its evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from detrelay.core.criterion import Criterion
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.streaming import StreamedSamples
from detrelay.core.data.transforms import DetectionDataset
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.inference import ImageResult
from detrelay.core.evaluation.coco_ap import CocoResult
from detrelay.core.evaluation.evaluators import CocoEvaluator, Evaluator


@dataclass(frozen=True)
class TrainingParts:
    """What a run trains, and on which data.

    Attributes:
        model: on any device, in float32.
        processor: stored with the model; turns outputs into boxes.
        criterion: the losses.
        train_data: images to learn from.
        val_data: images to evaluate on.
        ground_truth: COCO dict of the images to evaluate on.
        category_ids: original category id of each class index.
        evaluator: measures the model.
    """

    model: DetectorForObjectDetection
    processor: DetrelayImageProcessor
    criterion: Criterion
    train_data: DetectionDataset | StreamedSamples
    val_data: DetectionDataset
    ground_truth: dict[str, Any]
    category_ids: list[int]
    evaluator: Evaluator = field(default_factory=CocoEvaluator)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation during training.

    Attributes:
        epoch: epochs done.
        step: optimiser steps done.
        scores: the COCO figures.
        image_ids: ids of the evaluated images.
        results: for each image `scores`, `labels` and `boxes` xyxy in pixels.
    """

    epoch: int
    step: int
    scores: CocoResult
    image_ids: list[int]
    results: list[ImageResult]
