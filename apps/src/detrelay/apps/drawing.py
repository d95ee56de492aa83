"""Pictures: boxes on images, and the curves of a run."""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import torch
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.apps.labels import place_labels
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.engine import run_folder
from detrelay.core.engine.atomic_folder import written_aside
from detrelay.core.engine.logging import read_metrics
from detrelay.core.engine.trainer import Evaluation

_PICTURE_IMAGES = 4
_PICTURE_THRESHOLD = 0.3
# On smaller images labels would hide the objects.
_MIN_SHORT_SIDE = 320
# Thin images would become huge ones.
_MAX_ENLARGED_SIDE = 2000
_FONT = "DejaVu Sans"
_MARGIN = 2  # of a label, pixels
_DASH = 4  # widths of the line
_Box = tuple[float, float, float, float]
_GOLDEN_RATIO = 0.618034


def class_color(index: int) -> tuple[int, int, int]:
    """Red, green and blue of a class: fixed by its index, neighbours far apart."""
    hue = index * _GOLDEN_RATIO % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95 if index % 2 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: Tensor,
    boxes_xyxy: Tensor,
    classes: Sequence[int],
    captions: Sequence[str],
    *,
    dashed: Sequence[bool] | None = None,
    outlines: Tensor | None = None,
) -> Tensor:
    """Boxes with captions on an image.

    Args:
        image: uint8 [3, H, W].
        boxes_xyxy: float [n, 4], pixels; clipped to the image.
        classes: n class indices, which give the colours.
        captions: n texts, empty for none; the first ones are drawn on top and are placed first,
            see `place_labels`.
        dashed: n, whether a box has a dashed line; all solid if None.
        outlines: float [m, 4], boxes drawn below all others, thin and white.

    Returns:
        uint8 [3, H', W'], enlarged if the image is small. Captions that no installed font can draw
        are replaced by `class N`, with one warning.
    """
    height, width = image.shape[-2:]
    factor = min(_MIN_SHORT_SIDE / min(height, width), _MAX_ENLARGED_SIDE / max(height, width))
    scale = max(1.0, factor)
    if scale > 1:
        image = tv_functional.resize(image, [round(height * scale), round(width * scale)])
    unit = min(image.shape[-2:])
    boxes = _inside(boxes_xyxy * scale, image)
    picture = tv_functional.to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    for box in [] if outlines is None else _inside(outlines * scale, image):
        draw.rectangle(box, outline="white", width=1)
    colors = [class_color(index) for index in classes]
    styles = [False] * len(boxes) if dashed is None else dashed
    for box, color, dash in reversed(list(zip(boxes, colors, styles, strict=True))):
        _draw_box(draw, box, color, max(2, unit // 240), dashed=dash)
    _draw_labels(draw, boxes, colors, drawable(classes, captions), max(12, unit // 36))
    return tv_functional.pil_to_tensor(picture)


def _inside(boxes_xyxy: Tensor, image: Tensor) -> list[_Box]:
    """Boxes as far as they lie in an image."""
    height, width = image.shape[-2:]
    limit = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    cut: list[_Box] = torch.minimum(boxes_xyxy.float().clamp(min=0), limit).tolist()
    return cut


def _draw_box(
    draw: ImageDraw.ImageDraw, box: _Box, color: tuple[int, int, int], width: int, *, dashed: bool
) -> None:
    if not dashed:
        draw.rectangle(box, outline=color, width=width)
        return
    left, top, right, bottom = (round(side) for side in box)
    dash = _DASH * width
    for start in range(left, right, 2 * dash):
        for row in (top, bottom - width + 1):
            draw.rectangle((start, row, min(start + dash, right), row + width - 1), fill=color)
    for start in range(top, bottom, 2 * dash):
        for column in (left, right - width + 1):
            end = min(start + dash, bottom)
            draw.rectangle((column, start, column + width - 1, end), fill=color)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    boxes: Sequence[_Box],
    colors: Sequence[tuple[int, int, int]],
    texts: Sequence[tuple[str, str]],
    size: int,
) -> None:
    """White texts on the colour of their box; what is empty is left out."""
    fonts = [ImageFont.truetype(file, size) for file, _ in texts]
    extents = [
        (round(font.getlength(text)) + 2 * _MARGIN, sum(font.getmetrics()))
        for font, (_, text) in zip(fonts, texts, strict=True)
    ]
    shown = [index for index, (_, text) in enumerate(texts) if text]
    places = place_labels(
        [boxes[index] for index in shown],
        [extents[index] for index in shown],
        (draw.im.size[0], draw.im.size[1]),
    )
    for index, (left, top, right, bottom) in zip(shown, places, strict=True):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colors[index])
        draw.text((left + _MARGIN, top), texts[index][1], fill="white", font=fonts[index])


def drawable(classes: Sequence[int], captions: Sequence[str]) -> list[tuple[str, str]]:
    """The file of a font and the text to draw with it, for each caption.

    The default font if it has all characters, else the first installed font that does. If none
    does, the caption becomes `class N` and its score.
    """
    usual = font_manager.findfont(_FONT)
    known = _characters(usual) | {" "}
    shown = []
    for index, caption in zip(classes, captions, strict=True):
        needed = frozenset(caption) - {" "}
        font = usual if needed <= known else _font_with(needed)
        if font is None:
            # the score, which comes last, can always be drawn
            score = caption.rpartition(" ")[2]
            _say_not_drawn(index, caption.removesuffix(f" {score}"))
            caption = f"class {index} {score}" if known.issuperset(score) else f"class {index}"
        shown.append((font or usual, caption))
    return shown


@cache
def _characters(font: str) -> frozenset[str]:
    """What a font can draw; nothing if its file cannot be read."""
    try:
        return frozenset(map(chr, FT2Font(font).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _font_with(needed: frozenset[str]) -> str | None:
    """The first installed font that can draw all these characters."""
    files = sorted(entry.fname for entry in font_manager.fontManager.ttflist)
    return next((file for file in files if needed <= _characters(file) and _scales(file)), None)


def _scales(font: str) -> bool:
    """Whether a font is scalable; some contain bitmaps of one size."""
    try:
        ImageFont.truetype(font, 13)
    except OSError:
        return False
    return True


@cache
def _say_not_drawn(index: int, name: str) -> None:
    print(f"no font here can draw {name!r}: it is drawn as class {index}", file=sys.stderr)


class Reporter:
    """Redraws the curves and adds a picture after each evaluation.

    Args:
        output: folder of the run.
        samples: the evaluated images.
    """

    def __init__(self, output: Path, samples: AnnotatedImages | ShapesDataset) -> None:
        self.output = output
        self.samples = samples

    def __call__(self, evaluation: Evaluation) -> None:
        """Write `pictures/epoch_N.png` and `curves.png`."""
        pictures = self.output / run_folder.PICTURES
        draw_comparison(self.samples, evaluation, pictures / f"epoch_{evaluation.epoch}.png")
        draw_curves(self.output / run_folder.METRICS, self.output / run_folder.CURVES)


def draw_comparison(
    samples: AnnotatedImages | ShapesDataset, evaluation: Evaluation, target: Path
) -> None:
    """Ground truth and detections, side by side, for the first held-out images."""
    names = [category.name for category in samples.categories]
    found = dict(zip(evaluation.image_ids, evaluation.results, strict=True))
    count = min(_PICTURE_IMAGES, len(samples))
    figure, axes = plt.subplots(count, 2, figsize=(10, 5 * count), squeeze=False)
    for row in range(count):
        sample = samples[row]
        classes = sample.class_labels.tolist()
        truth = draw_boxes(sample.image, sample.boxes_xyxy, classes, [names[c] for c in classes])
        result = found[sample.image_id]
        kept = result["scores"] > _PICTURE_THRESHOLD
        classes, scores = result["labels"][kept].tolist(), result["scores"][kept].tolist()
        captions = [f"{names[c]} {s:.2f}" for c, s in zip(classes, scores, strict=True)]
        drawn = draw_boxes(sample.image, result["boxes"][kept], classes, captions)
        titles = (
            f"image {sample.image_id}: truth",
            f"after epoch {evaluation.epoch}, scores above {_PICTURE_THRESHOLD}",
        )
        for axis, picture, title in zip(axes[row], (truth, drawn), titles, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy())
            axis.set_title(title, fontsize=10)
            axis.axis("off")
    _save(figure, target)


_NOT_FIGURES = frozenset({"kind", "step", "epoch", "time"})


def draw_curves(metrics: Path, target: Path) -> None:
    """Losses of the last decoder stage, the total, and AP over the steps."""
    lines = read_metrics(metrics)
    steps = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    figure, (losses, precision) = plt.subplots(1, 2, figsize=(12, 4.5))
    if steps:
        x = [line["step"] for line in steps]
        last_stage = _last_stage_losses(list(steps[-1]["losses"]))
        losses.plot(x, [line["loss"] for line in steps], color="black", label="total (weighted)")
        for key in last_stage:
            losses.plot(x, [line["losses"].get(key) for line in steps], label=key, linewidth=1)
        losses.set_yscale("log")
        losses.legend(fontsize=8)
    # the first figures of the evaluator
    names = (
        [name for name in evaluations[-1] if name not in _NOT_FIGURES][:3] if evaluations else []
    )
    for key in names:
        x = [line["step"] for line in evaluations]
        precision.plot(x, [100 * line[key] for line in evaluations], marker="o", ms=3, label=key)
    precision.set_ylim(0, 100)
    precision.legend(fontsize=8)
    for axis, title in ((losses, "losses"), (precision, "held-out images, percent")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    _save(figure, target)


def _last_stage_losses(keys: Sequence[str]) -> list[str]:
    decoder = [key for key in keys if key.startswith("decoder/")]
    last = max(int(key.split("/")[1]) for key in decoder)
    return [key for key in decoder if key.startswith(f"decoder/{last}/")]


def _save(figure: Figure, target: Path) -> None:
    figure.tight_layout()
    with written_aside(target) as aside:
        figure.savefig(aside, dpi=90, format=target.suffix.removeprefix("."))
    plt.close(figure)
