"""The sections of a report about the stages' detections, labels and boxes."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from detrelay.apps.report_page import (
    Curve,
    Figures,
    Section,
    found_of_each,
    line_chart,
    models,
    percent,
    stage_names,
)
from detrelay.core.evaluation.cascade import SIZES
from detrelay.core.evaluation.tide import KINDS, MEANINGS

_MOST_CATEGORIES = 15
# smaller changes of AP, as fractions, are reported as none
_NOTHING = 0.0005
# from how much more AP on a detector needs NMS
_WORTH_NMS = 0.005


def precision(figures: Figures) -> Section:
    """AP of every stage."""
    keys = list(figures["stages"][0]["stats"])
    limits = figures["stages"][0]["maxDets"]
    curves = [
        Curve(
            prefix + key, stage_names(m), [s["stats"][key] for s in m["stages"]], m is not figures
        )
        for prefix, m in models(figures)
        for key in ("AP", "AP50", "AP75")
    ]

    def sentence(model: Figures) -> str:
        values = [stage["stats"]["AP"] for stage in model["stages"]]
        if values[0] < 0:
            return "There is no object to find."
        text = f"AP is {percent(values[0])} after stage 1 and {percent(values[-1])} after the last"
        steps = np.diff(values)
        if not len(steps):
            return f"AP is {percent(values[0])} after the one stage."
        most = int(steps.argmax())
        return f"{text}; stage {most + 2} adds most, {100 * steps[most]:+.1f} points."

    return Section(
        "precision",
        "AP of every stage",
        found_of_each(models(figures), sentence),
        "Average precision if the decoder ended after each stage: what each further stage adds. "
        f"AP counts up to {limits['AP']} detections per category and image.",
        lambda: line_chart(curves, "percent"),
        [
            ["stage", *(f"{key} (maxDets {limits[key]})" for key in keys)],
            *(
                [prefix + name, *(percent(stage["stats"][key]) for key in keys)]
                for prefix, model in models(figures)
                for name, stage in zip(stage_names(model), model["stages"], strict=True)
            ),
        ],
    )


def instability(figures: Figures) -> Section:
    """How far matching changes from stage to stage."""
    kinds = {
        "objects that change their query": "moved_share",
        "queries whose label changes": "changed_share",
    }

    def names(model: Figures) -> list[str]:
        return [f"{row + 1} to {row + 2}" for row in range(len(model["instability"]))]

    curves = [
        Curve(
            prefix + label, names(m), [entry[key] for entry in m["instability"]], m is not figures
        )
        for prefix, m in models(figures)
        for label, key in kinds.items()
    ]

    def sentence(model: Figures) -> str:
        shares = [percent(entry["moved_share"]) for entry in model["instability"]]
        if not shares:
            return "There is only one stage."
        return (
            f"{shares[0]} % of the objects are matched to another query in stage 2 than in stage "
            f"1, and {shares[-1]} % in the last stage than in the previous one."
        )

    return Section(
        "instability",
        "Label instability between stages",
        found_of_each(models(figures), sentence),
        "Each stage is matched one-to-one on its own (Hungarian). The first line, the unstable "
        "matching of Stable-DINO, is the share of objects that the next stage gives to another "
        "query. The second, StageInteractor's, is the share of queries, of those matched in either "
        "stage, whose class label is gained, lost or exchanged.",
        lambda: line_chart(curves, "percent", x_label="stages"),
        [
            ["stages", "objects", "other query", "percent", "labelled queries", "changed",
             "percent"],
            *(
                [prefix + name, str(entry["objects"]), str(entry["moved"]),
                 percent(entry["moved_share"]), str(entry["labelled"]), str(entry["changed"]),
                 percent(entry["changed_share"])]
                for prefix, model in models(figures)
                for name, entry in zip(names(model), model["instability"], strict=True)
            ),
        ],
    )  # fmt: skip


def moved_labels(figures: Figures) -> Section:
    """How the assigner changes the stages' own labels."""
    moved, names = figures["moved_labels"], stage_names(figures)
    assigner, own = figures["about"]["assigner"], moved["own"]
    added, lost = sum(moved["moved"]), sum(own) - sum(moved["kept"])
    later = int(np.triu(np.array(moved["origin"]), 1).sum())
    shows = (
        f"Over all stages {assigner} adds {added} labels to the {sum(own)} of the stages' own "
        f"matching ({percent(added / sum(own) if sum(own) else None)} %) and takes {lost} "
        f"of these away"
    )
    if added:
        shows += f"; {percent(later / added)} % of the added ones come from later stages"

    def draw() -> Figure:
        figure, axes = plt.subplots(2, 2, figsize=(10, 7.5))
        _by_origin(axes[0, 0], figures)
        bottom = np.zeros(len(names))
        for column, size in enumerate(SIZES):
            heights = np.array(moved["by_size"])[:, column]
            axes[0, 1].bar(names, heights, bottom=bottom, label=size)
            bottom += heights
        axes[0, 1].legend(fontsize=7)
        axes[0, 1].set(title="by size of the object", xlabel="stage that learns")
        total = np.array(moved["by_iou"]).sum(axis=0)
        axes[1, 0].bar((np.arange(10) + 0.5) / 10, total, 0.092)
        axes[1, 0].set(
            title="by IoU of the query's box, all stages", xlabel="IoU", ylabel="labels added"
        )
        _by_category(axes[1, 1], figures)
        for axis in axes.flat[:3]:
            axis.set_ylim(bottom=0)
        figure.tight_layout()
        return figure

    return Section(
        "moved_labels",
        "Labels that the assigner moves",
        f"{shows}.",
        f"How {assigner} changes each stage's own labels: labels kept, labels lost (their own "
        "box overlaps too little), and labels added, which come from the matching of another "
        "stage and are counted for the nearest stage that has them.",
        draw,
        [
            ["stage", "own", "kept", "lost", "added", "added per own label, percent"],
            *(
                [
                    name, str(own[row]), str(moved["kept"][row]),
                    str(own[row] - moved["kept"][row]), str(moved["moved"][row]),
                    percent(moved["moved"][row] / own[row] if own[row] else None),
                ]
                for row, name in enumerate(names)
            ),
        ],
    )  # fmt: skip


def _by_origin(axis: Axes, figures: Figures) -> None:
    moved, names = figures["moved_labels"], stage_names(figures)
    origin = np.array(moved["origin"])
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, len(names)))
    bottom = np.zeros(len(names))
    for source, name in enumerate(names):
        heights = origin[:, source]
        axis.bar(names, heights, bottom=bottom, color=colors[source], label=f"from stage {name}")
        bottom += heights
    axis.bar(names, moved["foreign"], bottom=bottom, color="0.7", label="from no stage")
    axis.legend(fontsize=7)
    axis.set(title="by origin", xlabel="stage that learns", ylabel="labels added")


def _by_category(axis: Axes, figures: Figures) -> None:
    """Labels added per own label, for the categories with the most objects."""
    moved = figures["moved_labels"]
    own, added = np.array(moved["own_by_category"]), np.array(moved["by_category"]).sum(axis=0)
    rows = np.argsort(-own, kind="stable")[:_MOST_CATEGORIES]
    rows = rows[own[rows] > 0]
    axis.barh([figures["categories"][row] for row in rows], 100 * added[rows] / own[rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)
    axis.set(title="by category, commonest first", xlabel="labels added per own label, percent")


def boxes(figures: Figures) -> Section:
    """How boxes move and fit."""
    lines = {
        "IoU with the object": lambda values: values["iou"],
        "movement, matched in the last stage": lambda values: [None, *values["movement"]],
        "movement, all queries": lambda values: [None, *values["all_movement"]],
    }

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    def sentence(model: Figures) -> str:
        overlap, steps = model["refinement"]["iou"], model["refinement"]["movement"]
        if overlap[0] is None:
            return "No query is matched."
        text = f"Queries that end on an object overlap it by {number(overlap[0])} after stage 1"
        text += f" and by {number(overlap[-1])} after the last"
        most = max(range(len(steps)), key=steps.__getitem__) if steps else None
        return f"{text}." if most is None else f"{text}; they move most in stage {most + 2}."

    curves = [
        Curve(prefix + name, stage_names(m), values(m["refinement"]), m is not figures)
        for prefix, m in models(figures)
        for name, values in lines.items()
    ]
    return Section(
        "boxes",
        "Boxes from stage to stage",
        found_of_each(models(figures), sentence),
        "Queries matched in the last stage, traced back: mean IoU of their boxes with the "
        "object, and how far boxes move from the stage before (1 - IoU of the two boxes).",
        lambda: line_chart(curves, "IoU, or 1 - IoU", factor=1.0),
        [
            ["stage", *lines],
            *(
                [
                    prefix + name,
                    *(number(values(m["refinement"])[row]) for values in lines.values()),
                ]
                for prefix, m in models(figures)
                for row, name in enumerate(stage_names(m))
            ),
        ],
    )


def duplicates(figures: Figures) -> Section:
    """Whether detections need NMS."""
    about = figures["about"]
    kinds = {"as it is": "duplicates", "after NMS": "duplicates_after_nms"}
    curves = [
        Curve(
            prefix + name,
            stage_names(model),
            [stage[key]["surplus"] for stage in model["stages"]],
            model is not figures,
        )
        for prefix, model in models(figures)
        for name, key in kinds.items()
    ]  # fmt: skip

    def sentence(model: Figures) -> str:
        last = model["stages"][-1]
        if last["stats"]["AP"] < 0:
            return "There is no object to find."
        change = last["AP_after_nms"] - last["stats"]["AP"]
        effect = f"changes AP by {100 * change:+.2f} points"
        if abs(change) < _NOTHING:
            effect = "leaves AP unchanged"
        surplus = last["duplicates"]["surplus"]
        beyond = (
            "no object is found" if surplus is None else f"{surplus:.2f} detections are surplus"
        )
        verdict = "the detector needs it" if change >= _WORTH_NMS else "the detector needs none"
        return f"In the last stage {beyond} per found object and NMS {effect}: {verdict}."

    return Section(
        "duplicates",
        "Duplicates, and whether NMS helps",
        found_of_each(models(figures), sentence),
        f"Detections (score {about['score_threshold']} and more, IoU 0.5 with an object of their "
        "category) more than one for each object found, with and without non-maximum suppression "
        f"at IoU {about['nms_iou']}. Where AP does not rise with suppression, the labels teach the "
        "stage to keep one detection for each object.",
        lambda: line_chart(curves, "surplus detections per found object", factor=1.0),
        [
            ["stage", "objects found", "detections", "surplus per object", "after NMS",
             "AP", "AP after NMS"],
            *(
                [
                    prefix + name,
                    str(stage["duplicates"]["objects"]),
                    str(stage["duplicates"]["claims"]),
                    *(
                        "-" if stage[key]["surplus"] is None else f"{stage[key]['surplus']:.3f}"
                        for key in kinds.values()
                    ),
                    percent(stage["stats"]["AP"], 2),
                    percent(stage["AP_after_nms"], 2),
                ]
                for prefix, model in models(figures)
                for name, stage in zip(stage_names(model), model["stages"], strict=True)
            ),
        ],
    )  # fmt: skip


def errors(figures: Figures) -> Section:
    """Kinds of errors by stage."""
    stages, names = figures["errors"], stage_names(figures)
    curves = [Curve(kind, names, [stage["gains"][kind] for stage in stages]) for kind in KINDS]
    meanings = "; ".join(f"{kind}: {meaning}" for kind, meaning in MEANINGS.items())

    def sentence(model: Figures) -> str:
        gains = model["errors"][-1]["gains"]
        worst = max(KINDS, key=gains.__getitem__)
        return (
            f"In the last stage {worst} errors cost most, {percent(gains[worst])} points of AP50."
        )

    return Section(
        "errors",
        "Errors of every stage",
        found_of_each(models(figures), sentence),
        "AP at IoU 0.5 that would be gained if all errors of one kind were mended, as TIDE defines "
        f"them ({meanings}).",
        lambda: line_chart(curves, "AP gained, points"),
        [
            ["stage", *(f"{kind} (errors)" for kind in KINDS), "AP50 here"],
            *(
                [
                    prefix + name,
                    *(f"{percent(s['gains'][kind])} ({s['counts'][kind]})" for kind in KINDS),
                    percent(s["ap"]),
                ]
                for prefix, model in models(figures)
                for name, s in zip(stage_names(model), model["errors"], strict=True)
            ),
        ],
    )
