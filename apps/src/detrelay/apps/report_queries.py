"""The sections of a report about queries: features, filters and places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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

_MOST_COLORS = 9
_OTHER = "0.75"
# share of the image's area below which a box counts as small in a query map
_SMALL_BOX = 0.1
_MAP_COLORS = {"small": "#2f9e44", "wide": "#e03131", "high": "#1971c2"}


def similarity(figures: Figures) -> Section:
    """Linear CKA between stages."""
    shown = [(prefix, model) for prefix, model in models(figures) if model["similarity"]]

    def draw() -> Figure:
        figure, axes = plt.subplots(
            1, len(shown), figsize=(5 * len(shown), 4.2), squeeze=False, layout="constrained"
        )
        for axis, (prefix, model) in zip(axes.flat, shown, strict=True):
            names = stage_names(model)
            picture = _heat_map(axis, np.array(model["similarity"]), names, names, 0.6)
            axis.set(xlabel="stage", ylabel="stage", title=prefix.strip(": "))
        figure.colorbar(picture, ax=axes, label="linear CKA")
        return figure

    def sentence(model: Figures) -> str:
        values = np.diagonal(np.array(model["similarity"]), offset=1)
        if not len(values):
            return "There is only one stage."
        low, high = int(values.argmin()), int(values.argmax())
        return (
            f"Of adjacent stages, {low + 1} and {low + 2} differ most (CKA {values[low]:.2f}) "
            f"and {high + 1} and {high + 2} least ({values[high]:.2f})."
        )

    return Section(
        "similarity",
        "Similarity of stages",
        found_of_each(shown, sentence),
        "Linear CKA (Kornblith et al., 2019) of the query features that each stage's class scores "
        "are computed from, over up to 100 evenly spaced queries of every image: 1 for the same "
        "features up to rotation and scale, 0 for unrelated ones.",
        draw,
    )


def _heat_map(
    axis: Axes, matrix: Any, columns: Sequence[str], rows: Sequence[str], bright: float
) -> Any:
    """A matrix with its numbers, the first row at the bottom; NaN stays empty."""
    picture = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
    for row, column in np.ndindex(*matrix.shape):
        if np.isfinite(value := matrix[row, column]):
            color = "black" if value > bright else "white"
            text = f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    return picture


def separability(figures: Figures) -> Section:
    """How well a linear model separates classes."""
    shown = [(prefix, model) for prefix, model in models(figures) if model["separability"]]
    curves = []
    for prefix, model in shown:
        names, values = stage_names(model), model["separability"]
        beside = model is not figures
        curves.append(Curve(f"{prefix}linear model", names, values["right"], beside))
        chance = [values["chance"]] * len(names)
        curves.append(Curve(f"{prefix}the commonest class", names, chance, beside))

    def sentence(model: Figures) -> str:
        values = model["separability"]
        return (
            f"A linear model predicts the class of {percent(values['right'][0])} % of the held-out "
            f"queries from the features of stage 1, and of {percent(values['right'][-1])} % from "
            f"those of the last."
        )

    def draw() -> Figure:
        figure = line_chart(curves, "held-out queries named correctly, percent")
        figure.axes[0].set_ylim(0, 100)
        return figure

    return Section(
        "separability",
        "Linear separability of query features",
        found_of_each(shown, sentence),
        "Queries matched in the last stage, traced back. Multinomial logistic regression "
        "learns the class of the matched object from the features that each stage's class scores "
        "are computed from (mean 0 and variance 1, scikit-learn's default penalty), on a random "
        "half of the images, and is asked about the queries of the other half. The flat line is "
        "what naming the commonest class would reach.",
        draw,
        [
            ["stage", "right, percent", "commonest class, percent", "learned from", "asked about"],
            *(
                [
                    prefix + name,
                    percent(model["separability"]["right"][row]),
                    percent(model["separability"]["chance"]),
                    str(model["separability"]["learned"]),
                    str(model["separability"]["held_out"]),
                ]
                for prefix, model in shown
                for row, name in enumerate(stage_names(model))
            ),
        ],
    )


def feature_map(figures: Figures) -> Section:
    """T-SNE of query features, a row of stages for each model."""
    shown = [(prefix, model) for prefix, model in models(figures) if model["feature_maps"]]

    def draw() -> Figure:
        panels = [
            (f"{prefix}stage {name}", model["feature_maps"], row)
            for prefix, model in shown
            for row, name in enumerate(stage_names(model))
        ]
        columns = min(3, max(len(stage_names(model)) for _, model in shown))
        rows = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.4 * columns, 3.2 * rows), squeeze=False,
            layout="constrained",
        )  # fmt: skip
        named = _commonest([model["feature_maps"]["category"] for _, model in shown])
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (title, values, row) in zip(axes.flat, panels, strict=False):
            _scatter(axis, np.array(values["places"][row]), values["category"], named, figures)
            axis.set_title(title, fontsize=10)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, fontsize=8, loc="outside lower center", ncols=min(5, len(labels))
        )
        return figure

    counts = {len(model["feature_maps"]["category"]) for _, model in shown}
    return Section(
        "feature_maps",
        "Map of query features",
        f"Each point is one of {' and '.join(map(str, sorted(counts)))} queries that the last "
        f"stage matches, in the colour of its object's class, near others with similar features: "
        f"where colours cluster, the stage separates the classes.",
        "T-SNE (van der Maaten and Hinton, 2008; scikit-learn, perplexity 30, the same queries in "
        "every stage) of the features that each stage's class scores are computed from. Distances "
        "between far points and the turn of a map mean nothing.",
        draw,
    )


def _commonest(categories: Sequence[Sequence[int]]) -> list[int]:
    values, counts = np.unique(np.concatenate(categories), return_counts=True)
    return [int(value) for value in values[np.argsort(-counts, kind="stable")][:_MOST_COLORS]]


def _scatter(
    axis: Axes, places: Any, category: Sequence[int], named: Sequence[int], figures: Figures
) -> None:
    classes = np.array(category)
    groups = {"other": (~np.isin(classes, named), _OTHER)}
    for number, value in enumerate(named):
        groups[figures["categories"][value]] = (classes == value, f"C{number}")
    for name, (rows, color) in groups.items():
        if name != "other" or rows.any():
            x, y = places[rows].T
            axis.scatter(x, y, s=6, color=color, label=name)
    axis.set_xticks([])
    axis.set_yticks([])


def gates(figures: Figures) -> Section:
    """How far reused filters are gated in."""
    shown = [(prefix, model) for prefix, model in models(figures) if model["gates"]]
    panels = [
        (prefix, model, kind)
        for prefix, model in shown
        for kind in ("channel", "spatial")
        if any(gate["kind"] == kind for gate in model["gates"])
    ]

    def draw() -> Figure:
        rows, columns = len(shown), -(-len(panels) // len(shown))
        figure, axes = plt.subplots(
            rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        for axis, (prefix, model, kind) in zip(axes.flat, panels, strict=False):
            picture = _gate_map(axis, model, kind)
            axis.set_title(f"{prefix}{kind} filters", fontsize=10)
        figure.colorbar(picture, ax=axes, label="mean gate")
        return figure

    def sentence(model: Figures) -> str:
        ranked = sorted(model["gates"], key=lambda gate: gate["all"])
        if len(ranked) == 1:
            only = ranked[0]
            return (
                f"There is one reuse, of the {only['kind']} filters of stage {only['source'] + 1}; "
                f"its mean gate is {only['all']:.2f}."
            )
        low, high = (
            f"{gate['kind']} filters of stage {gate['source'] + 1} in stage {gate['stage'] + 1} "
            f"({gate['all']:.2f})"
            for gate in (ranked[0], ranked[-1])
        )
        return f"The gates let in the {high} most and the {low} least."

    return Section(
        "gates",
        "Which reused filters are gated in",
        found_of_each(shown, sentence),
        "StageInteractor blends a stage's own filter with that of an earlier stage, entry by "
        "entry: 0 keeps the own filter, 1 takes the earlier one, and before training every gate is "
        "0.25. Shown is the mean over the entries, groups and queries of all images; the table has "
        "it for the queries that the last stage matches, too.",
        draw,
        [
            ["stage", "filter of stage", "kind", "all queries", "matched queries"],
            *(
                [
                    f"{prefix}{gate['stage'] + 1}", str(gate["source"] + 1), gate["kind"],
                    f"{gate['all']:.3f}",
                    "-" if gate["matched"] is None else f"{gate['matched']:.3f}",
                ]
                for prefix, model in shown
                for gate in model["gates"]
            ),
        ],
    )  # fmt: skip


def _gate_map(axis: Axes, model: Figures, kind: str) -> Any:
    """The gates of one kind, by the stages that make filters and those that reuse them."""
    gates = [gate for gate in model["gates"] if gate["kind"] == kind]
    users, sources = (sorted({gate[key] for gate in gates}) for key in ("stage", "source"))
    matrix = np.full((len(users), len(sources)), np.nan)
    for gate in gates:
        matrix[users.index(gate["stage"]), sources.index(gate["source"])] = gate["all"]
    axis.set(xlabel="stage that made the filter", ylabel="stage that reuses it")
    return _heat_map(
        axis, matrix, [str(row + 1) for row in sources], [str(row + 1) for row in users], 0.6
    )


def query_maps(figures: Figures) -> Section:
    """The boxes of the queries matched most often."""

    def sentence(model: Figures) -> str:
        place = [entry["place"] for entry in model["specialisation"]]
        return (
            f"The query explains {percent(place[0])} % of the variance of box "
            f"centres in stage 1 and {percent(place[-1])} % in the last."
        )

    def draw() -> Figure:
        maps = figures["query_maps"]
        columns = min(5, len(maps))
        rows = -(-len(maps) // columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(2 * columns, 2.2 * rows), squeeze=False, layout="constrained"
        )
        for axis in axes.flat[len(maps) :]:
            axis.axis("off")
        for axis, entry in zip(axes.flat, maps, strict=False):
            _centres(axis, np.array(entry["boxes"]))
            axis.set_title(f"query {entry['query']}: {entry['objects']}", fontsize=9)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
        return figure

    rows: list[list[str]] = [["stage", "centres explained, percent", "sides explained, percent"]]
    for prefix, model in models(figures):
        for name, entry in zip(stage_names(model), model["specialisation"], strict=True):
            rows.append([prefix + name, percent(entry["place"]), percent(entry["size"])])
    first = "" if figures["beside"] is None else " of model A"
    return Section(
        "query_maps",
        "Places of the queries",
        found_of_each(models(figures), sentence),
        f"Box centres of the last stage{first} over the images, in units of the image, for the "
        "queries that it matches most often (the number after the query), as in figure 7 of DETR: "
        f"green for boxes below {_SMALL_BOX:.0%} of the image, else red for wide and blue for high "
        "ones. The table has the share of the variance of all boxes' centres, and of the "
        "logarithms of their sides, that lies between queries: 0 where queries are alike, 100 "
        "where each always has the same place.",
        draw,
        rows,
    )


def _centres(axis: Axes, boxes: Any) -> None:
    x, y, width, height = boxes.T
    small = width * height < _SMALL_BOX
    kinds = {"small": small, "wide": ~small & (width >= height), "high": ~small & (width < height)}
    for kind, rows in kinds.items():
        axis.scatter(x[rows], y[rows], s=4, color=_MAP_COLORS[kind], label=kind)
    axis.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
    axis.set_xticks([])
    axis.set_yticks([])


def sections_of_queries(figures: Figures) -> list[Section]:
    """The sections for which at least one model has figures."""
    known: dict[str, Callable[[Figures], Section]] = {
        "separability": separability,
        "feature_maps": feature_map,
        "similarity": similarity,
        "gates": gates,
        "query_maps": query_maps,
    }
    return [
        make(figures)
        for name, make in known.items()
        if any(model[name] for _, model in models(figures))
    ]
