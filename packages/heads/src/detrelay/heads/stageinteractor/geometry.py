"""The decoder's box representation: x, y, log2 sqrt(w h), log2(h / w), in pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from detrelay.core.boxes import area, cxcywh_to_xyxy, intersection

_POSITION_TEMPERATURE = 10000.0
_POSITION_UNIT_PX = 1000.0


def sizes_of(boxes: Tensor) -> Tensor:
    """Width and height [..., 2] in pixels of boxes (x, y, log2 scale, log2 ratio) [..., 4]."""
    scale, ratio = boxes[..., 2:3], boxes[..., 3:4]
    return torch.cat([2 ** (scale - 0.5 * ratio), 2 ** (scale + 0.5 * ratio)], dim=-1)


def position_code(boxes: Tensor, dim: int) -> Tensor:
    """Sine and cosine code [..., dim] of boxes (x, y, log2 scale, log2 ratio) [..., 4]."""
    width = dim // 4
    turns = torch.cat([boxes[..., :2] / _POSITION_UNIT_PX, boxes[..., 2:]], dim=-1)
    # float32 even for float64 boxes, as in the released code
    exponent = 2 * torch.arange(width // 2, dtype=torch.float32, device=boxes.device) / width
    angle = turns[..., None] / (_POSITION_TEMPERATURE**exponent).to(boxes.dtype)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def log_coverage(boxes: Tensor) -> Tensor:
    """Natural logarithm of the share of box i that box j covers: [B, Q, 4] -> [B, Q, Q]."""
    corners = cxcywh_to_xyxy(torch.cat([boxes[..., :2], sizes_of(boxes)], dim=-1))
    covered = intersection(corners[:, :, None], corners[:, None])
    return (covered / area(corners).clamp(min=1e-6)[..., None] + 1e-7).log()


def grid_boxes(count: int, like: Tensor) -> Tensor:
    """Boxes side by side in rows, as many columns as rows or one more, in units of the image.

    Each is as wide as two columns and as high as two rows; the last row may hold fewer.

    Args:
        count: Q, number of boxes.
        like: gives dtype and device.

    Returns:
        [Q, 4], cxcywh.
    """
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    index = torch.arange(count, device=like.device)
    row = index.div(columns, rounding_mode="floor")
    in_row = (count - row * columns).clamp(max=columns)
    x = (index % columns + 0.5) / in_row
    y = (row + 0.5) / rows
    sides = (torch.full_like(x, 2 / columns), torch.full_like(x, 2 / rows))
    return torch.stack([x, y, *sides], dim=-1).to(like.dtype)
