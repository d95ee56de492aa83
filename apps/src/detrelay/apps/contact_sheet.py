"""A page of samples with their boxes, and histograms of a split."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.apps.drawing import class_color, draw_boxes
from detrelay.core.data.annotations import Annotations
from detrelay.core.data.decode import read_image
from detrelay.core.errors import DataError

_MAX_ROWS, _COLUMNS = 3, 4
_SIDE = 480
# More captions would hide the objects; colours tell the categories apart.
_MAX_CAPTIONS = 30
# Minimum longer side of a drawn box, pixels: on smaller ones the caption would cover it.
_MIN_CAPTIONED = 60
_MAX_BARS = 60
_MAX_CATEGORIES = 20


def draw_contact_sheet(part: Annotations, title: str, target: Path) -> None:
    """Draw samples spread over a split, and its histograms.

    Args:
        part: the split.
        title: its name.
        target: PNG file to write.
    """
    spread = np.linspace(0, len(part) - 1, _MAX_ROWS * _COLUMNS)
    chosen = np.unique(spread.round().astype(int))
    rows = -(-len(chosen) // _COLUMNS)
    figure, axes = plt.subplots(
        rows + 1, _COLUMNS, figsize=(16, 3.8 * (rows + 1)), squeeze=False, layout="constrained"
    )
    for axis in axes[:rows].flat:
        axis.axis("off")
    for axis, row in zip(axes[:rows].flat, chosen.tolist(), strict=False):
        axis.set_title(_short(part.images.name(row)), fontsize=8)
        try:
            axis.imshow(_picture(part, row).permute(1, 2, 0).numpy())
        except DataError as error:
            axis.text(0.5, 0.5, _short(str(error), 60), ha="center", va="center", wrap=True)
    _histograms(axes[rows], part)
    figure.suptitle(f"{title}: {len(part)} images, {len(part.box_ids)} boxes", fontsize=14)
    figure.savefig(target, dpi=80)
    plt.close(figure)


def _short(text: str, longest: int = 44) -> str:
    text = text.replace("$", r"\$")  # or matplotlib would parse it as mathematics
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _picture(part: Annotations, row: int) -> torch.Tensor:
    """An image with its boxes; crowds are marked in the caption."""
    height, width = part.sizes[row].tolist()
    image = read_image(part.images.open(row), size=(height, width), name=part.images.name(row))
    scale = _SIDE / max(height, width)
    if scale < 1:
        shape = [max(1, round(height * scale)), max(1, round(width * scale))]
        image = tv_functional.resize(image, shape)
    scale = min(scale, 1.0)
    rows = np.flatnonzero(part.box_image == row)
    rows = rows[(part.boxes_xywh[rows, 2:] > 0).all(1)]
    boxes = torch.from_numpy(part.boxes_xywh[rows] * scale)
    boxes[:, 2:] += boxes[:, :2]
    labels = part.box_class[rows].tolist()
    captions = [
        part.categories[label].name + (" (crowd)" if part.crowd[box] else "")
        for label, box in zip(labels, rows, strict=True)
    ]
    large = (boxes[:, 2:] - boxes[:, :2]).max(1).values >= _MIN_CAPTIONED
    if len(captions) > _MAX_CAPTIONS:
        captions = [""] * len(captions)
    captions = [text if shown else "" for text, shown in zip(captions, large, strict=True)]
    return draw_boxes(image, boxes, labels, captions)


def _histograms(axes: np.ndarray, part: Annotations) -> None:
    names = [category.name for category in part.categories]
    counts = np.bincount(part.box_class, minlength=len(names))
    order = np.argsort(-counts, kind="stable")[:_MAX_CATEGORIES]
    colors = [np.divide(class_color(int(row)), 255) for row in order[::-1]]
    places = np.arange(len(order))
    axes[0].barh(places, counts[order[::-1]], color=colors)
    axes[0].set_yticks(places, [_short(names[row], 20) for row in order[::-1]])
    more = f" (the {_MAX_CATEGORIES} largest)" if len(names) > _MAX_CATEGORIES else ""
    axes[0].set_title(f"boxes by category{more}", fontsize=9)
    per_image = np.bincount(part.box_image, minlength=len(part))
    step = max(1, int(per_image.max()) // _MAX_BARS)
    axes[1].hist(per_image, bins=np.arange(0, per_image.max() + step + 1, step) - 0.5)
    axes[1].set_title("boxes per image", fontsize=9)
    size = part.boxes_xywh[:, 2:]
    size = size[(size > 0).all(1)]
    axes[2].hist(np.sqrt(size.prod(1)), bins=40)
    axes[2].set_title("side of boxes: root of area, pixels", fontsize=9)
    if len(size):
        axes[3].hist(np.log2(size[:, 0] / size[:, 1]), bins=40)
    axes[3].set_title("shape of boxes: log2 of width over height", fontsize=9)
    for axis in axes:
        axis.tick_params(labelsize=7)
