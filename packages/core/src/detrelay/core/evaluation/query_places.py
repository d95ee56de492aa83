"""Where the boxes of each query are: whether queries specialise in places and sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detrelay.core.evaluation.cascade import Cascade
from detrelay.core.evaluation.tables import Floats

_SMALLEST = 1e-6  # a side, in units of the image, before its logarithm


@dataclass(frozen=True, slots=True)
class Specialisation:
    """How far the query determines the boxes of one stage.

    Attributes:
        place: share of the variance of box centres (in units of the image, both axes together) that
            lies between queries, not between the images of one query; 0 if queries do not differ, 1
            if every query always has the same place. None without any variance.
        size: the same for the logarithms of width and height.
    """

    place: float | None
    size: float | None


def specialisation(cascade: Cascade) -> list[Specialisation]:
    """The share of boxes' variance explained by the query, stage by stage."""
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
    """The boxes of one query in the last stage.

    Attributes:
        query: its index.
        objects: number of objects that the last stage matches to it.
        boxes: float64 [N, 4], cxcywh in units of the image, one for each of N images.
    """

    query: int
    objects: int
    boxes: Floats


def busiest_queries(cascade: Cascade, count: int, most_boxes: int) -> list[QueryMap]:
    """Maps of the queries matched most often in the last stage; the first in case of a tie.

    Args:
        cascade: the stages.
        count: number of queries.
        most_boxes: maximum number of images in a map, evenly spaced.
    """
    objects = np.bincount(cascade.own[-1].query, minlength=cascade.queries)
    boxes = relative_boxes(cascade, len(cascade.boxes) - 1)
    images = np.unique(np.linspace(0, len(boxes) - 1, min(len(boxes), most_boxes)).round())
    rows = images.astype(np.int64)
    chosen = np.argsort(-objects, kind="stable")[:count]
    return [
        QueryMap(int(query), int(objects[query]), boxes[rows, query]) for query in chosen.tolist()
    ]
