"""Draw who learns what, stage by stage, under three assigners: docs/images/targets.png.

python benchmarks/targets_picture.py ../shared/data/bccd

The image and its objects are real (a folder with `images/` and `train.json`); the predictions are
planted to show how the assigners differ: three queries near each object, a different one of which
fits best in each stage, and strays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import tyro
from PIL import Image
from torch import Tensor, tensor

from detrelay.apps.console import run
from detrelay.assigners import build_assigner
from detrelay.core.losses import LossConfig
from detrelay.core.recipes.recipe import AssignerSettings
from detrelay.core.structures import Assignment, StagePrediction, Targets

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

# with their options; one_to_many's limit to a quarter of the queries assumes many more queries
ASSIGNERS: dict[str, dict[str, Any]] = {
    "cross_stage": {},
    "union": {},
    "one_to_many": {"max_positives": 0},
}
# of the three queries of an object in each stage: how far off in shares of its size, and the score
_OFF = ((0.10, 0.16, 0.34), (0.17, 0.08, 0.30), (0.13, 0.10, 0.05))
_SCORES = ((0.60, 0.40, 0.20), (0.40, 0.70, 0.25), (0.45, 0.50, 0.80))
_DIRECTIONS = ((-1.0, -0.3), (0.9, -0.5), (0.2, 1.0))
_STRAYS = ((0.15, 0.85, 0.12, 0.15), (0.85, 0.15, 0.12, 0.15))
_PALETTE = 128  # colours of the file
_COLORS = ("tab:red", "tab:blue", "tab:green", "tab:orange")
_STYLES = {"class and box": "-", "class only": "--", "box only": ":"}


def planted(boxes: Tensor, labels: Sequence[int], classes: int) -> list[StagePrediction]:
    """Three stages of predictions around objects [T, 4]: three queries each, and the strays."""
    stages = []
    for off, scores in zip(_OFF, _SCORES, strict=True):
        rows, logits = [], []
        for (x, y, w, h), label in zip(boxes.tolist(), labels, strict=True):
            for (dx, dy), share, score in zip(_DIRECTIONS, off, scores, strict=True):
                rows.append((x + dx * share * w, y + dy * share * h, w, h))
                logits.append([score if c == label else 0.02 for c in range(classes)])
        rows += _STRAYS
        logits += [[0.02] * classes] * len(_STRAYS)
        stages.append(StagePrediction(tensor([logits]).logit(), tensor([rows])))
    return stages


def assign(name: str, stages: Sequence[StagePrediction], targets: Targets) -> Sequence[Assignment]:
    """An assigner's result for the stages."""
    return build_assigner(AssignerSettings(name, ASSIGNERS[name]), LossConfig())(stages, targets)


def learned(assignment: Assignment) -> dict[tuple[int, int], str]:
    """What each pair of query and object learns: a key of the styles."""
    classes, boxes = (
        set(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True))
        for pairs in (assignment.classes, assignment.boxes)
    )
    kinds = {(True, True): "class and box", (True, False): "class only", (False, True): "box only"}
    return {pair: kinds[pair in classes, pair in boxes] for pair in sorted(classes | boxes)}


def draw(image: Any, targets: Targets, classes: int, path: Path) -> None:
    """Draw a row for each assigner and a column for each stage.

    Args:
        image: uint8 [H, W, 3].
        targets: the objects of the one image.
        classes: K.
        path: where to write.
    """
    stages = planted(targets.boxes, targets.labels.tolist(), classes)
    figure, axes = plt.subplots(
        len(ASSIGNERS), len(stages), figsize=(12, 9.6), layout="constrained", squeeze=False
    )
    for row, name in zip(axes, ASSIGNERS, strict=True):
        assignments = assign(name, stages, targets)
        for index, (axis, stage) in enumerate(zip(row, stages, strict=True)):
            axis.imshow(image, alpha=0.45)
            axis.set_axis_off()
            _draw_stage(axis, stage, learned(assignments[index]), image.shape)
            pairs = assignments[index]
            axis.set_title(
                f"{name}, stage {index + 1}: {len(pairs.classes)} class pairs, "
                f"{len(pairs.boxes)} box pairs",
                fontsize=9,
            )
    lines = [Line2D([], [], color="black", linestyle=s, linewidth=2) for s in _STYLES.values()]
    names = [f"learns {kind}" for kind in _STYLES]
    figure.legend(
        [*lines, Line2D([], [], color="gray", linewidth=0.8)],
        [*names, "learns nothing (planted predictions; colours are objects)"],
        loc="outside lower center",
        ncols=4,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)
    with Image.open(path) as picture:
        few_colors = picture.convert("RGB").quantize(_PALETTE)
    few_colors.save(path, optimize=True)


def _draw_stage(
    axis: Axes,
    stage: StagePrediction,
    pairs: dict[tuple[int, int], str],
    shape: tuple[int, ...],
) -> None:
    height, width = shape[:2]
    taken = {query for query, _ in pairs}
    for query, (x, y, w, h) in enumerate(stage.boxes[0].tolist()):
        corner, size = ((x - w / 2) * width, (y - h / 2) * height), (w * width, h * height)
        if query not in taken:
            axis.add_patch(Rectangle(corner, *size, fill=False, color="gray", linewidth=0.8))
        for target in [t for q, t in pairs if q == query]:
            axis.add_patch(
                Rectangle(
                    corner,
                    *size,
                    fill=False,
                    color=_COLORS[target % len(_COLORS)],
                    linestyle=_STYLES[pairs[query, target]],
                    linewidth=1.8,
                )
            )


@dataclass(frozen=True)
class Arguments:
    """Draw who learns what under three assigners.

    Attributes:
        data: folder with `images/` and `train.json`.
        image: file name in `images/`.
        output: picture to write.
    """

    data: Annotated[Path, tyro.conf.Positional]
    image: str = "BloodImage_00235.jpg"
    output: Path = Path("docs/images/targets.png")


def main(arguments: Arguments) -> int:
    """Draw the picture; returns the exit code.

    Raises:
        ValueError: the annotation file does not list the image.
    """
    annotations = json.loads((arguments.data / "train.json").read_text(encoding="utf-8"))
    entries = [e for e in annotations["images"] if e["file_name"] == arguments.image]
    if not entries:
        raise ValueError(f"{arguments.data / 'train.json'} names no image {arguments.image}")
    entry = entries[0]
    objects = [o for o in annotations["annotations"] if o["image_id"] == entry["id"]]
    ids = [category["id"] for category in annotations["categories"]]
    corners = tensor([o["bbox"] for o in objects]).float()
    sizes = tensor([entry["width"], entry["height"]] * 2).float()
    boxes = corners / sizes
    boxes[:, :2] += boxes[:, 2:] / 2
    targets = Targets.from_labels(
        [{"class_labels": tensor([ids.index(o["category_id"]) for o in objects]), "boxes": boxes}]
    )
    image = plt.imread(arguments.data / "images" / arguments.image)
    draw(image, targets, len(ids), arguments.output)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Arguments)))
