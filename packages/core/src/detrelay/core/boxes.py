"""Box formats and overlaps. All functions broadcast over leading axes and carry gradients.

Pairwise overlaps come from broadcasting: `iou(a[:, None], b[None])` is [N, M], `iou(a, b)` paired.
IoU and GIoU are invariant to scaling each axis, so boxes in [0, 1] and boxes in pixels agree.
Both are computed coordinate by coordinate: fastest on views of [4, ...], whose coordinates lie
apart in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps 0 / 0 of two empty boxes finite. Far below the area of any real box in units of its image.
_EPSILON = 1e-12


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners: [..., 4] -> [..., 4]."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size: [..., 4] -> [..., 4]."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Areas [...] of corner boxes [..., 4]; negative sides count as zero."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)


def intersection(first_xyxy: Tensor, second_xyxy: Tensor) -> Tensor:
    """Overlap areas [...] of corner boxes that broadcast against each other."""
    left, top, right, bottom = zip(first_xyxy.unbind(-1), second_xyxy.unbind(-1), strict=True)
    width = torch.minimum(*right) - torch.maximum(*left)
    height = torch.minimum(*bottom) - torch.maximum(*top)
    return width.clamp(min=0) * height.clamp(min=0)


def iou(first_xyxy: Tensor, second_xyxy: Tensor, epsilon: float = 0.0) -> Tensor:
    """Intersection over union [...] of corner boxes that broadcast against each other.

    Args:
        first_xyxy: [..., 4].
        second_xyxy: [..., 4].
        epsilon: added to the denominator; see `giou`.
    """
    shared, union = _shared_and_union(first_xyxy, second_xyxy)
    return shared / (union + epsilon)


def giou(first_xyxy: Tensor, second_xyxy: Tensor, epsilon: float = 0.0) -> Tensor:
    """Generalised IoU [...] in [-1, 1] of corner boxes that broadcast against each other.

    Args:
        first_xyxy: [..., 4].
        second_xyxy: [..., 4].
        epsilon: added to both denominators (1e-6 in DINO).

    Reference: Rezatofighi et al., CVPR 2019, algorithm 1.
    """
    shared, union = _shared_and_union(first_xyxy, second_xyxy)
    left, top, right, bottom = zip(first_xyxy.unbind(-1), second_xyxy.unbind(-1), strict=True)
    width = torch.maximum(*right) - torch.minimum(*left)
    height = torch.maximum(*bottom) - torch.minimum(*top)
    hull = (width.clamp(min=0) * height.clamp(min=0)).clamp(min=_EPSILON)
    return shared / (union + epsilon) - (hull - union) / (hull + epsilon)


def _shared_and_union(first_xyxy: Tensor, second_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    shared = intersection(first_xyxy, second_xyxy)
    union = (area(first_xyxy) + area(second_xyxy) - shared).clamp(min=_EPSILON)
    return shared, union
