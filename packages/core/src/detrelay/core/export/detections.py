"""Class scores and boxes to detections in numpy, as in the image processor's post-processing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detrelay.core.errors import NonFiniteOutput

NMS_CANDIDATES = 10_000  # best pairs per image that take part in NMS, as in DETA
Floats = NDArray[np.float32]
Detection = dict[str, NDArray[np.float32] | NDArray[np.int64]]


def detections_of(
    logits: Floats,
    pred_boxes: Floats,
    sizes: Sequence[tuple[int, int]],
    *,
    threshold: float,
    top_k: int,
    clip: bool,
    nms_iou_threshold: float | None,
) -> list[Detection]:
    """Detections of each image, best first.

    Args:
        logits: [B, Q, K] before the sigmoid.
        pred_boxes: [B, Q, 4] cxcywh in [0, 1].
        sizes: (height, width) of each image, pixels.
        threshold: detections score above this.
        top_k: maximum detections per image.
        clip: clip boxes to the image.
        nms_iou_threshold: see `DetrelayImageProcessor`.

    Returns:
        One mapping per image: `scores` float32 [n], `labels` int64 [n], `boxes` float32 [n, 4] xyxy
        in pixels.

    Raises:
        NonFiniteOutput: a score or a box is NaN or infinite.
    """
    if not (np.isfinite(logits).all() and np.isfinite(pred_boxes).all()):
        raise NonFiniteOutput("the model's scores or boxes are not finite")
    half = pred_boxes[..., 2:] / 2
    corners = np.concatenate([pred_boxes[..., :2] - half, pred_boxes[..., :2] + half], axis=-1)
    if clip:
        corners = corners.clip(0, 1)
    num_classes = logits.shape[-1]
    count = top_k if nms_iou_threshold is None else NMS_CANDIDATES
    found: list[Detection] = []
    for image, (height, width) in enumerate(sizes):
        scores = _sigmoid(logits[image]).ravel()
        order = np.argsort(-scores, kind="stable")[:count]
        order = order[scores[order] > threshold]
        boxes = corners[image][order // num_classes]
        boxes = boxes * np.array([width, height, width, height], dtype=np.float32)
        labels = (order % num_classes).astype(np.int64)
        kept: NDArray[np.int64] = np.arange(len(order))
        if nms_iou_threshold is not None:
            kept = _survivors(boxes, labels, nms_iou_threshold)
        kept = kept[:top_k]
        found.append({"scores": scores[order][kept], "labels": labels[kept], "boxes": boxes[kept]})
    return found


def _sigmoid(logits: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, its inverse 0
        return (1 / (1 + np.exp(-logits))).astype(np.float32)


def _survivors(boxes: Floats, labels: NDArray[np.int64], threshold: float) -> NDArray[np.int64]:
    """Rows, best first, that overlap no better row of their class by more than the threshold."""
    left = np.ones(len(boxes), dtype=np.bool_)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for row in range(len(boxes)):
        if not left[row]:
            continue
        low = np.maximum(boxes[row, :2], boxes[row + 1 :, :2])
        high = np.minimum(boxes[row, 2:], boxes[row + 1 :, 2:])
        shared = (high - low).clip(0).prod(axis=1)
        with np.errstate(invalid="ignore"):  # two boxes without area do not overlap
            overlap = shared / (area[row] + area[row + 1 :] - shared)
        left[row + 1 :] &= ~((overlap > threshold) & (labels[row + 1 :] == labels[row]))
    return np.flatnonzero(left)
