"""Evaluators, which measure a model in training, by name: the one place to register a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from detrelay.core.evaluation.backends import BackendName
from detrelay.core.evaluation.coco_ap import CocoResult, evaluate_coco
from detrelay.core.evaluation.tables import Detections, GroundTruth
from detrelay.core.registry import find_part, make_part


class Evaluator(Protocol):
    """Scores detections; the first of its figures decides which model is the best."""

    def __call__(
        self,
        ground_truth: Mapping[str, Any] | GroundTruth,
        detections: Detections,
        *,
        max_detections: int,
    ) -> CocoResult:
        """Figures by name, as fractions; for the first, higher is better.

        Args:
            ground_truth: a COCO mapping with `images`, `annotations` and `categories`.
            detections: what the model found on these images.
            max_detections: maximum detections per category and image.
        """


@dataclass(frozen=True)
class CocoEvaluator:
    """The twelve figures of COCO.

    Attributes:
        backend: the implementation, a key of `BACKENDS`; the figures are the same.
    """

    backend: BackendName = "pycocotools"

    def __call__(
        self,
        ground_truth: Mapping[str, Any] | GroundTruth,
        detections: Detections,
        *,
        max_detections: int,
    ) -> CocoResult:
        """See `evaluate_coco`."""
        return evaluate_coco(
            ground_truth, detections, max_detections=max_detections, backend=self.backend
        )


EVALUATORS: dict[str, Callable[..., Evaluator]] = {"coco": CocoEvaluator}


def build_evaluator(name: str, options: Mapping[str, Any]) -> Evaluator:
    """The evaluator of that name.

    Args:
        name: a key of `EVALUATORS`, or `module:Class` for a custom one.
        options: arguments of its constructor.

    Raises:
        ValueError: there is no such evaluator, or it rejects an option.
    """
    part = find_part("evaluator", name, EVALUATORS)
    evaluator: Evaluator = make_part("evaluator", name, part, options, {})
    return evaluator
