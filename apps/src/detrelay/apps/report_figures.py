"""The figures of a report, from a recording, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from detrelay.core.evaluation import cascade as analysis
from detrelay.core.evaluation import query_features
from detrelay.core.evaluation.backends import BackendName, accumulate
from detrelay.core.evaluation.coco_ap import limits_of, summarize
from detrelay.core.evaluation.query_places import busiest_queries, specialisation
from detrelay.core.evaluation.recording import Recording
from detrelay.core.evaluation.tables import Found, GroundTruth
from detrelay.core.evaluation.tide import error_breakdown
from detrelay.heads.stageinteractor.gates import FilterGate

SCORE_THRESHOLD = 0.3
NMS_IOU = 0.7
_MAPPED_QUERIES, _MOST_BOXES = 15, 400
NO_FEATURES = (
    "The head does not expose its query features: no similarity of stages, no separability and no "
    "map of query features."
)
NO_SKLEARN = (
    "scikit-learn is not installed (pip install 'detrelay[report]'): no separability and no map of "
    "query features."
)
NO_GATES = "The model reuses no filters: no gates."
TOO_FEW = "Too few matched queries, or all of one class: no separability or no map of features."


def place(truth: GroundTruth, recording: Recording) -> list[Found]:
    """The detections of each stage, in the categories of the data."""
    return [
        truth.place(part.select(np.isin(part.category_ids, truth.category_ids)))
        for part in recording.detections
    ]


def analyse(
    truth: GroundTruth,
    found: Sequence[Found],
    recording: Recording,
    gates: Sequence[FilterGate],
    *,
    max_detections: int,
    backend: BackendName,
    gallery: int,
) -> dict[str, Any]:
    """All figures of one model's page.

    Args:
        truth: of the recorded images.
        found: the detections of each stage.
        recording: of the model.
        gates: recorded in the same passes.
        max_detections: maximum boxes per image.
        backend: the implementation of AP.
        gallery: number of hardest images to list.
    """
    cascade = recording.cascade
    moved = analysis.moved_labels(cascade, len(truth.names))
    hardest = analysis.hardest_images(truth, found[-1], SCORE_THRESHOLD, max_detections, gallery)
    similarity = recording.similarity
    return {
        "stages": [stage_figures(truth, part, max_detections, backend) for part in found],
        "errors": [
            asdict(error_breakdown(truth, part, max_detections=max_detections)) for part in found
        ],
        "instability": [
            asdict(entry) | {"moved_share": entry.moved_share, "changed_share": entry.changed_share}
            for entry in analysis.instability(cascade)
        ],
        "moved_labels": {
            key: value if isinstance(value, list) else value.tolist()
            for key, value in asdict(moved).items()
        },
        "refinement": asdict(analysis.refinement(cascade)),
        "similarity": None if similarity is None else similarity.matrix().tolist(),
        **feature_figures(recording),
        "gates": gate_figures(recording, gates),
        "specialisation": [asdict(entry) for entry in specialisation(cascade)],
        "query_maps": [
            asdict(entry) | {"boxes": entry.boxes.tolist()}
            for entry in busiest_queries(cascade, _MAPPED_QUERIES, _MOST_BOXES)
        ],
        "hardest": [
            asdict(entry) | {"image_id": int(truth.image_ids[entry.image])} for entry in hardest
        ],
    }


def stage_figures(
    truth: GroundTruth, found: Found, max_detections: int, backend: BackendName
) -> dict[str, Any]:
    """AP and duplicates of one stage, with and without NMS."""
    limits = limits_of(max_detections)
    kept = analysis.suppress(found, NMS_IOU)
    scores, scores_after = (
        summarize(accumulate(truth, part, limits, backend), truth.names, max_detections)
        for part in (found, kept)
    )
    before, after = (analysis.duplicates(truth, part, SCORE_THRESHOLD) for part in (found, kept))
    return {
        **scores.to_dict(),
        "AP_after_nms": scores_after.stats["AP"],
        "duplicates": asdict(before) | {"surplus": before.surplus},
        "duplicates_after_nms": asdict(after) | {"surplus": after.surplus},
    }


def feature_figures(recording: Recording) -> dict[str, Any]:
    """Separability and map of the query features; None for what is not available."""
    result: dict[str, Any] = {"separability": None, "feature_maps": None}
    if recording.features is None or not query_features.is_available():
        return result
    if separability := query_features.separability(recording.features):
        result["separability"] = asdict(separability)
    if maps := query_features.feature_maps(recording.features):
        result["feature_maps"] = {
            "places": maps.places.tolist(),
            "category": maps.category.tolist(),
        }
    return result


def gate_figures(recording: Recording, gates: Sequence[FilterGate]) -> list[dict[str, Any]]:
    """The mean gate of each reused filter, over all queries and over those matched last."""
    cascade = recording.cascade
    last = cascade.own[-1]
    result = []
    for gate in gates:
        values = gate.by_query(cascade.queries)[recording.seen].astype(np.float64)
        matched = values[cascade.image[last.object], last.query]
        result.append(
            {
                "stage": gate.stage,
                "source": gate.source,
                "kind": gate.kind,
                "all": float(values.mean()),
                "matched": float(matched.mean()) if len(matched) else None,
            }
        )
    return result


def left_out(figures: dict[str, Any]) -> list[str]:
    """The reasons for missing charts, a sentence each."""
    reasons = []
    if figures["similarity"] is None:
        reasons.append(NO_FEATURES)
    elif not query_features.is_available():
        reasons.append(NO_SKLEARN)
    elif figures["separability"] is None or figures["feature_maps"] is None:
        reasons.append(TOO_FEW)
    if not figures["gates"]:
        reasons.append(NO_GATES)
    return reasons
