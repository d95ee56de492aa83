"""Where the boxes of each query land: whether queries have places and sizes of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detrelay.core.evaluation.cascade import Cascade
from detrelay.core.evaluation.tables import Floats

_SMALLEST = 1e-6  # a side, in units of the image, before its logarithm


@dataclass(frozen=True, slots=True)
class Specialisation:
    """How far the boxes of one stage follow from which query they are of.

    Attributes:
        place: share of the variance of box centres (in units of the image, both axes together)
            that lies between queries, not between the images of one query; 0 where queries do not
            differ, 1 where every query always has the same place. None without any variance.
        size: the same for the logarithms of width and height.
    """

    place: float | None
    size: float | None


def specialisation(cascade: Cascade) -> list[Specialisation]:
    """What the query explains of its boxes, stage by stage."""
    result = []
    for stage in range(len(cascade.boxes)):
        boxes = relative_boxes(cascade, stage)
        sides = np.log(np.maximum(boxes[..., 2:], _SMALLEST))
        result.append(Specialisation(_explained(boxes[..., :2]), _explained(sides)))
    return result


def relative_boxes(cascade: Cascade, stage: int) -> Floats:
    """Boxes cxcywh [I, Q, 4] of a stage in units of their image."""
    boxes = cascade.boxes[stage].astype(np.float64)
    size = boxes[..., 2:]
    whwh = np.tile(cascade.image_sizes, 2)[:, None]
    return np.concatenate([boxes[..., :2] + size / 2, size], axis=-1) / whwh


def _explained(values: Floats) -> float | None:
    """Share of the variance of values [I, Q, 2] that lies between the means of the queries."""
    between = values.mean(axis=0) - values.mean(axis=(0, 1))
    total = ((values - values.mean(axis=(0, 1))) ** 2).mean(axis=(0, 1)).sum()
    return float((between**2).mean(axis=0).sum() / total) if total > 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class QueryMap:
    """Where the boxes of one query land in the last stage.

    Attributes:
        query: its number.
        objects: how many objects the last stage matches to it.
        boxes: float64 [N, 4], cxcywh in units of the image, one for each of N images.
    """

    query: int
    objects: int
    boxes: Floats


def busiest_queries(cascade: Cascade, count: int, most_boxes: int) -> list[QueryMap]:
    """Maps of the queries that the last stage matches most often; of equal ones the first.

    Args:
        cascade: the stages.
        count: how many queries.
        most_boxes: most images that a map shows, evenly spaced.
    """
    objects = np.bincount(cascade.own[-1].query, minlength=cascade.queries)
    boxes = relative_boxes(cascade, len(cascade.boxes) - 1)
    images = np.unique(np.linspace(0, len(boxes) - 1, min(len(boxes), most_boxes)).round())
    rows = images.astype(np.int64)
    chosen = np.argsort(-objects, kind="stable")[:count]
    return [
        QueryMap(int(query), int(objects[query]), boxes[rows, query]) for query in chosen.tolist()
    ]
