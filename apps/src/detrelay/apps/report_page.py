"""The page of a report: charts, what they show, and the numbers behind them."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from detrelay.apps.charts import save
from detrelay.apps.drawing import draw_boxes
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.evaluation.cascade import SIZES
from detrelay.core.evaluation.tables import Found, GroundTruth
from detrelay.core.evaluation.tide import KINDS, MEANINGS

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem;
  color: #1a202c }
h1 { font-size: 1.6rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem }
img { max-width: 100%; height: auto }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e2e8f0;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere }
nav a { margin-right: 1rem; white-space: nowrap }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: file name of the chart, and anchor.
        title: heading.
        text: what the chart shows.
        figure: draws the chart.
        rows: the numbers, a row of headings first; empty for none.
    """

    name: str
    title: str
    text: str
    figure: Callable[[], Figure]
    rows: list[list[str]]


def write_page(
    figures: dict[str, Any],
    samples: AnnotatedImages,
    truth: GroundTruth,
    found: Sequence[Found],
    folder: Path,
) -> Path:
    """Write the charts and the page that holds them; the page's file."""
    sections = [
        _precision(figures),
        _instability(figures),
        _moved(figures),
        _boxes(figures),
        _duplicates(figures),
        *([_similarity(figures)] if figures["similarity"] is not None else []),
        _errors(figures),
        *_gallery(figures, samples, truth, found),
    ]
    parts = []
    for section in sections:
        picture = save(section.figure(), folder / f"{section.name}.png")
        code = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(
            f'<h2 id="{section.name}">{html.escape(section.title)}</h2>\n'
            f"<p>{html.escape(section.text)}</p>\n"
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{code}">\n'
            f"{_table(section.rows)}"
        )
    if figures["similarity"] is None:
        parts.append("<p>The head does not show its query features: no similarity of stages.</p>")
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a> ' for s in sections)
    about = "".join(
        f"<dt>{html.escape(key.replace('_', ' '))}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in figures["about"].items()
    )
    page = folder / "report.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Stages of {html.escape(figures['about']['model'])}</title>\n"
        f"<style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>Stages of {html.escape(figures['about']['model'])}</h1>\n<dl>{about}</dl>\n"
        f"<nav><p>{links}</p></nav>\n" + "\n".join(parts) + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _table(rows: list[list[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows[1:]
    )
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None or value < 0 else f"{100 * value:.{digits}f}"


def _stage_names(figures: dict[str, Any]) -> list[str]:
    return [str(stage + 1) for stage in range(len(figures["stages"]))]


def _lines(
    x: Sequence[str],
    curves: dict[str, list[float | None]],
    label: str,
    *,
    factor: float = 100.0,
    x_label: str = "stage",
) -> Figure:
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for name, values in curves.items():
        heights = [np.nan if value is None or value < 0 else factor * value for value in values]
        axis.plot(x, heights, marker="o", ms=4, label=name)
    axis.set(xlabel=x_label, ylabel=label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _precision(figures: dict[str, Any]) -> Section:
    stages, names = figures["stages"], _stage_names(figures)
    keys = list(stages[0]["stats"])
    curves = {key: [stage["stats"][key] for stage in stages] for key in ("AP", "AP50", "AP75")}
    limits = stages[0]["maxDets"]
    return Section(
        "precision",
        "AP of every stage",
        "Average precision if the decoder ended after each stage: what each further stage adds. "
        f"AP looks at {limits['AP']} detections per category and image.",
        lambda: _lines(names, curves, "percent"),
        [
            ["stage", *(f"{key} (maxDets {limits[key]})" for key in keys)],
            *(
                [name, *(_percent(stage["stats"][key]) for key in keys)]
                for name, stage in zip(names, stages, strict=True)
            ),
        ],
    )


def _instability(figures: dict[str, Any]) -> Section:
    entries = figures["instability"]
    names = [f"{row + 1} to {row + 2}" for row in range(len(entries))]
    curves = {
        "objects that change their query": [entry["moved_share"] for entry in entries],
        "queries whose label changes": [entry["changed_share"] for entry in entries],
    }
    return Section(
        "instability",
        "Label instability between stages",
        "Each stage is matched one-to-one for itself (Hungarian). The first line, the unstable "
        "matching of Stable-DINO, is the share of objects that the next stage gives to another "
        "query. The second, StageInteractor's, is the share of queries, of those matched in either "
        "stage, whose class label is gained, lost or exchanged.",
        lambda: _lines(names, curves, "percent", x_label="stages"),
        [
            ["stages", "objects", "other query", "percent", "labelled queries", "changed",
             "percent"],
            *(
                [name, str(entry["objects"]), str(entry["moved"]), _percent(entry["moved_share"]),
                 str(entry["labelled"]), str(entry["changed"]), _percent(entry["changed_share"])]
                for name, entry in zip(names, entries, strict=True)
            ),
        ],
    )  # fmt: skip


def _moved(figures: dict[str, Any]) -> Section:
    moved, names = figures["moved_labels"], _stage_names(figures)
    origin = np.array(moved["origin"])

    def draw() -> Figure:
        figure, (by_origin, by_size, by_iou) = plt.subplots(1, 3, figsize=(12, 3.8))
        colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, len(names)))
        bottom = np.zeros(len(names))
        for source_stage, name in enumerate(names):
            by_origin.bar(
                names, origin[:, source_stage], bottom=bottom, color=colors[source_stage],
                label=f"from stage {name}",
            )  # fmt: skip
            bottom += origin[:, source_stage]
        by_origin.bar(names, moved["foreign"], bottom=bottom, color="0.7", label="from no stage")
        by_origin.legend(fontsize=7)
        by_origin.set(title="by origin", xlabel="stage that learns", ylabel="labels")
        bottom = np.zeros(len(names))
        for column, size in enumerate(SIZES):
            heights = np.array(moved["by_size"])[:, column]
            by_size.bar(names, heights, bottom=bottom, label=size)
            bottom += heights
        by_size.legend(fontsize=7)
        by_size.set(title="by size of the object", xlabel="stage that learns")
        total = np.array(moved["by_iou"]).sum(axis=0)
        by_iou.bar((np.arange(10) + 0.5) / 10, total, 0.092)
        by_iou.set(title="by IoU of the query's box, all stages", xlabel="IoU")
        for axis in (by_origin, by_size, by_iou):
            axis.set_ylim(bottom=0)
        figure.tight_layout()
        return figure

    own = moved["own"]
    return Section(
        "moved_labels",
        "Labels that the assigner moves",
        f"What the assigner {figures['about']['assigner']} makes of each stage's own labels: "
        "labels kept, labels lost (their own box overlaps too little), and labels that come from "
        "the matching of another stage, counted for the nearest stage that has them.",
        draw,
        [
            ["stage", "own", "kept", "lost", "moved in", "moved in per own label, percent"],
            *(
                [
                    name, str(own[row]), str(moved["kept"][row]),
                    str(own[row] - moved["kept"][row]), str(moved["moved"][row]),
                    _percent(moved["moved"][row] / own[row] if own[row] else None),
                ]
                for row, name in enumerate(names)
            ),
        ],
    )  # fmt: skip


def _boxes(figures: dict[str, Any]) -> Section:
    boxes, names = figures["refinement"], _stage_names(figures)
    movement = {
        "matched in the last stage": [None, *boxes["movement"]],
        "all queries": [None, *boxes["all_movement"]],
    }

    def draw() -> Figure:
        figure, axis = plt.subplots(figsize=(7, 3.8))
        missing = [np.nan if value is None else value for value in boxes["iou"]]
        axis.plot(names, missing, marker="o", color="black", label="IoU with the object")
        for name, values in movement.items():
            heights = [np.nan if value is None else value for value in values]
            axis.plot(names, heights, marker="s", ms=4, ls="--", label=f"movement, {name}")
        axis.set(xlabel="stage", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        return figure

    return Section(
        "boxes",
        "Boxes from stage to stage",
        "Queries that the last stage matches, followed back: mean IoU of their boxes with the "
        "object, and how far boxes move from the stage before (1 - IoU of the two boxes).",
        draw,
        [
            ["stage", "IoU with the object", *(f"movement, {name}" for name in movement)],
            *(
                [name, *(
                    "-" if value is None else f"{value:.3f}"
                    for value in (boxes["iou"][row], *(m[row] for m in movement.values()))
                )]
                for row, name in enumerate(names)
            ),
        ],
    )  # fmt: skip


def _duplicates(figures: dict[str, Any]) -> Section:
    stages, names, about = figures["stages"], _stage_names(figures), figures["about"]
    surplus = {
        "as it is": [stage["duplicates"]["surplus"] for stage in stages],
        "after NMS": [stage["duplicates_after_nms"]["surplus"] for stage in stages],
    }
    return Section(
        "duplicates",
        "Duplicates, and whether NMS helps",
        f"Detections (score {about['score_threshold']} and more, IoU 0.5 with an object of their "
        "category) more than one for each object found, with and without non-maximum suppression "
        f"at IoU {about['nms_iou']}. Where AP does not rise with suppression, the labels teach the "
        "stage to keep one detection for each object.",
        lambda: _lines(names, surplus, "surplus detections per found object", factor=1.0),
        [
            ["stage", "objects found", "detections", "surplus per object", "after NMS",
             "AP", "AP after NMS"],
            *(
                [
                    name,
                    str(stage["duplicates"]["objects"]),
                    str(stage["duplicates"]["claims"]),
                    *(
                        "-" if stage[key]["surplus"] is None else f"{stage[key]['surplus']:.3f}"
                        for key in ("duplicates", "duplicates_after_nms")
                    ),
                    _percent(stage["stats"]["AP"], 2),
                    _percent(stage["AP_after_nms"], 2),
                ]
                for name, stage in zip(names, stages, strict=True)
            ),
        ],
    )  # fmt: skip


def _similarity(figures: dict[str, Any]) -> Section:
    matrix, names = np.array(figures["similarity"]), _stage_names(figures)

    def draw() -> Figure:
        figure, axis = plt.subplots(figsize=(5, 4.2))
        picture = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
        figure.colorbar(picture, ax=axis, label="linear CKA")
        for row, column in np.ndindex(*matrix.shape):
            color = "black" if matrix[row, column] > 0.6 else "white"
            text = f"{matrix[row, column]:.2f}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="stage", ylabel="stage")
        return figure

    return Section(
        "similarity",
        "Similarity of stages",
        "Linear CKA (Kornblith et al., 2019) of the query features that each stage's class scores "
        "are computed from, over all queries of all images: 1 for the same features up to rotation "
        "and scale, 0 for unrelated ones.",
        draw,
        [],
    )


def _errors(figures: dict[str, Any]) -> Section:
    errors, names = figures["errors"], _stage_names(figures)
    curves = {kind: [stage["gains"][kind] for stage in errors] for kind in KINDS}
    meanings = "; ".join(f"{kind}: {meaning}" for kind, meaning in MEANINGS.items())
    return Section(
        "errors",
        "Errors of every stage",
        "AP at IoU 0.5 that would be gained if all errors of one kind were mended, as TIDE defines "
        f"them ({meanings}).",
        lambda: _lines(names, curves, "AP gained, points"),
        [
            ["stage", *(f"{kind} (errors)" for kind in KINDS), "AP50 here"],
            *(
                [
                    name,
                    *(f"{_percent(s['gains'][kind])} ({s['counts'][kind]})" for kind in KINDS),
                    _percent(s["ap"]),
                ]
                for name, s in zip(names, errors, strict=True)
            ),
        ],
    )


def _gallery(
    figures: dict[str, Any], samples: AnnotatedImages, truth: GroundTruth, found: Sequence[Found]
) -> list[Section]:
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
                f"{entry['missed']} of {entry['objects']} objects missed and {entry['wrong']} "
                f"wrong detections in the last stage (IoU 0.5, scores from "
                f"{figures['about']['score_threshold']}); the truth, then every stage.",
                draw,
                [],
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
