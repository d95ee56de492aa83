"""The hardest images of a report, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from detrelay.apps.drawing import draw_boxes
from detrelay.apps.report_page import Figures, Section
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.evaluation.tables import Found, GroundTruth


def gallery(
    figures: Figures, samples: AnnotatedImages, truth: GroundTruth, found: Sequence[Found]
) -> list[Section]:
    """A section for each of the hardest images."""
    index = {image_id: row for row, image_id in enumerate(samples.image_ids)}
    sections = []
    for number, entry in enumerate(figures["hardest"], start=1):
        sample = samples[index[entry["image_id"]]]

        def draw(sample: Any = sample, image: int = entry["image"]) -> Figure:
            return _stage_by_stage(sample, image, truth, found, figures)

        sections.append(
            Section(
                f"hardest_{number}",
                f"Hardest image {number}: {entry['image_id']}",
                f"The last stage misses {entry['missed']} of {entry['objects']} objects and has "
                f"{entry['wrong']} wrong detections.",
                "The ground truth, then the detections of every stage with scores from "
                f"{figures['about']['score_threshold']}; wrong and missed are counted at IoU 0.5.",
                draw,
            )
        )
    return sections


def _stage_by_stage(
    sample: Any, image: int, truth: GroundTruth, found: Sequence[Found], figures: dict[str, Any]
) -> Figure:
    columns = min(4, len(found) + 1)
    rows = -(-(len(found) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 3.2 * rows), squeeze=False)
    classes = sample.class_labels.tolist()
    pictures = [("truth", sample.boxes_xyxy, classes, ["" for _ in classes])]
    for stage, part in enumerate(found, start=1):
        keep = (part.image == image) & (part.scores >= figures["about"]["score_threshold"])
        own = part.select(keep).ranked(100, by_category=False)
        corner, size = own.boxes_xywh[:, :2], own.boxes_xywh[:, 2:]
        boxes = torch.from_numpy(np.concatenate([corner, corner + size], axis=1))
        captions = [
            f"{truth.names[category]} {score:.2f}"
            for category, score in zip(own.category, own.scores, strict=True)
        ]
        pictures.append((f"stage {stage}", boxes, own.category.tolist(), captions))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, boxes, labels, captions) in zip(axes.flat, pictures, strict=False):
        names = captions if title != "truth" else [truth.names[label] for label in labels]
        drawn = draw_boxes(sample.image, boxes, labels, names)
        axis.imshow(drawn.permute(1, 2, 0).numpy())
        axis.set_title(title, fontsize=10)
    figure.tight_layout()
    return figure
