"""The page of a report: charts, explanations and numbers."""

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
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from detrelay.apps.charts import save

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem;
  color: #1a202c }
h1 { font-size: 1.6rem; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .3rem }
.shows { font-weight: 600; margin: .3rem 0 }
.how { color: #4a5568; font-size: .9rem; max-width: 50rem }
img { display: block; max-width: 100%; height: auto }
.table { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0 }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e2e8f0;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 }
dd { margin: 0; overflow-wrap: anywhere }
nav { line-height: 1.9; margin: 1rem 0 }
nav a { display: inline-block; margin-right: 1rem }
"""

_NEW_LINE = "\n"

Figures = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: file name of the chart, and anchor.
        title: heading.
        shows: what the chart shows, in a sentence; on a separate line for each model.
        text: definitions of its figures.
        figure: draws the chart.
        rows: the numbers, with a header row first; empty for none.
    """

    name: str
    title: str
    shows: str
    text: str
    figure: Callable[[], Figure]
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Curve:
    """A line over stages.

    Attributes:
        label: for the legend.
        x: names of the positions.
        y: values; None for a gap.
        beside: whether it belongs to the second model.
    """

    label: str
    x: Sequence[str]
    y: Sequence[float | None]
    beside: bool = False


def write_page(
    figures: Figures, sections: Sequence[Section], left_out: Sequence[str], folder: Path
) -> Path:
    """Write the charts and the page with them; returns the page's file.

    Args:
        figures: `about` of each model is shown.
        sections: in order.
        left_out: reasons for missing charts, a sentence each.
        folder: existing folder.
    """
    parts = []
    for section in sections:
        picture = save(section.figure(), folder / f"{section.name}.png")
        code = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(
            f'<h2 id="{section.name}">{html.escape(section.title)}</h2>\n'
            f'<p class="shows">{html.escape(section.shows).replace(_NEW_LINE, "<br>")}</p>\n'
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{code}">\n'
            f'<p class="how">{html.escape(section.text)}</p>\n'
            f"{_table(section.rows)}"
        )
    if left_out:
        listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in left_out)
        parts.append(f'<h2 id="left_out">Left out</h2>\n<ul>{listed}</ul>')
    links = "".join(f'<a href="#{s.name}">{html.escape(s.title)}</a> ' for s in sections)
    about = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in _facts(figures)
    )
    title = html.escape(f"Stages of {figures['about']['model']}")
    page = folder / "report.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{title}</h1>\n<dl>{about}</dl>\n<nav>{links}</nav>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )
    return page


def _facts(figures: Figures) -> list[tuple[str, Any]]:
    """The subject of the page: first what differs between the models, then what they share."""
    shared, own = [], []
    for prefix, model in models(figures):
        for key, value in model["about"].items():
            name = key.replace("_", " ")
            if any(other["about"][key] != value for _, other in models(figures)):
                own.append((prefix + name, value))
            elif model is figures:
                shared.append((name, value))
    return own + shared


def models(figures: Figures) -> list[tuple[str, Figures]]:
    """The models of a report with the prefix of their names: A and B if there are two."""
    if figures["beside"] is None:
        return [("", figures)]
    return [("A: ", figures), ("B: ", figures["beside"])]


def found_of_each(shown: Sequence[tuple[str, Figures]], sentence: Callable[[Figures], str]) -> str:
    """A sentence for each model, on separate lines."""
    return _NEW_LINE.join(prefix + sentence(model) for prefix, model in shown)


def stage_names(figures: Figures) -> list[str]:
    """The stages from 1."""
    return [str(stage + 1) for stage in range(len(figures["stages"]))]


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; a dash for None and for unmeasured values."""
    return "-" if value is None or value < 0 else f"{100 * value:.{digits}f}"


def line_chart(
    curves: Sequence[Curve], label: str, *, factor: float = 100.0, x_label: str = "stage"
) -> Figure:
    """Lines over stages; those of a second model are dashed, in the colours of the first."""
    figure, axis = plt.subplots(figsize=(7, 3.8))
    colors: dict[str, Any] = {}
    for curve in curves:
        own = curve.label.split(": ", 1)[-1]
        heights = [np.nan if y is None or y < 0 else factor * y for y in curve.y]
        style = "--" if curve.beside else "-"
        (line,) = axis.plot(
            curve.x, heights, style, marker="o", ms=4, label=curve.label, color=colors.get(own)
        )
        colors.setdefault(own, line.get_color())
    axis.set(xlabel=x_label, ylabel=label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows[1:]
    )
    return f'<div class="table"><table><tr>{head}</tr>\n{body}</table></div>'
