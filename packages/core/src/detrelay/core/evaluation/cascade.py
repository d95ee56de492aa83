"""What happens between the stages of a decoder: pure functions over arrays.

Letters in shapes: S stages, I images, Q queries, T objects, M labels, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detrelay.core.evaluation.matching import match
from detrelay.core.evaluation.tables import Bools, Floats, Found, GroundTruth, Ints, box_iou

SIZES = ("small", "medium", "large")
_SIZE_BORDERS = (32.0**2, 96.0**2)
_IOU_BORDERS: Floats = np.linspace(0, 1, 11)


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Class labels that queries learn in one stage.

    Attributes:
        object: int64 [M], row of the object.
        query: int64 [M], query of the object's image.
    """

    object: Ints
    query: Ints

    def __len__(self) -> int:
        return len(self.object)

    def keys(self, queries: int) -> Ints:
        """One number for each pair of object and query."""
        return self.object * queries + self.query


@dataclass(frozen=True, slots=True, eq=False)
class Cascade:
    """All stages of a decoder over a dataset; query q is the same slot in all stages.

    Attributes:
        image: int64 [T], image of each object that queries are matched to.
        category: int64 [T].
        target_boxes: float64 [T, 4], its box xywh, pixels.
        image_sizes: float64 [I, 2], width and height of each image, pixels.
        boxes: float32 [S, I, Q, 4], boxes xywh, pixels.
        own: S labels of the stages' own one-to-one matching.
        learned: S labels that the assigner under study derives from them.
    """

    image: Ints
    category: Ints
    target_boxes: Floats
    image_sizes: Floats
    boxes: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    own: tuple[Labels, ...]
    learned: tuple[Labels, ...]

    @property
    def queries(self) -> int:
        """Queries per image."""
        return int(self.boxes.shape[2])

    def query_of(self) -> Ints:
        """Int64 [S, T], the query matched to each object by stage; -1 for none."""
        result = np.full((len(self.own), len(self.image)), -1, dtype=np.int64)
        for stage, labels in enumerate(self.own):
            result[stage, labels.object] = labels.query
        return result

    def overlap(self, stage: int, labels: Labels) -> Floats:
        """IoU [M] of each label's query, by its box of a stage, with the object."""
        found = self.boxes[stage, self.image[labels.object], labels.query].astype(np.float64)
        return paired_iou(found, self.target_boxes[labels.object])


@dataclass(frozen=True, slots=True)
class Instability:
    """How far the matching changes from one stage to the next.

    Attributes:
        objects: objects that are matched in both stages.
        moved: of these, objects matched to another query in the later stage.
        labelled: queries matched in at least one of the two stages.
        changed: of these, queries whose label differs: gained, lost or of another class.
    """

    objects: int
    moved: int
    labelled: int
    changed: int

    @property
    def moved_share(self) -> float | None:
        """Share of objects that change their query; None without objects."""
        return self.moved / self.objects if self.objects else None

    @property
    def changed_share(self) -> float | None:
        """Share of labelled queries whose label changes; None without any."""
        return self.changed / self.labelled if self.labelled else None


def instability(cascade: Cascade) -> list[Instability]:
    """Changes of the own matching between adjacent stages, S - 1 of them."""
    query_of, slots = cascade.query_of(), cascade.boxes.shape[1] * cascade.queries
    first = cascade.image * cascade.queries
    result = []
    for before, after in itertools.pairwise(query_of):
        both = (before >= 0) & (after >= 0)
        label = np.full((2, slots), -1, dtype=np.int64)
        for row, queries in enumerate((before, after)):
            known = queries >= 0
            label[row, (first + queries)[known]] = cascade.category[known]
        result.append(
            Instability(
                objects=int(both.sum()),
                moved=int((both & (before != after)).sum()),
                labelled=int((label >= 0).any(axis=0).sum()),
                changed=int((label[0] != label[1]).sum()),
            )
        )
    return result


@dataclass(frozen=True, slots=True, eq=False)
class MovedLabels:
    """How an assigner changes the stages' own labels.

    Attributes:
        own: [S], labels of the own matching.
        kept: [S], of these, labels that the stage learns too.
        moved: [S], labels that the stage learns and its own matching does not have.
        origin: int64 [S, S], moved labels by stage that learns (row) and nearest stage whose own
            matching has the pair (column; the earlier in case of a tie); labels that no stage has
            are not included.
        foreign: [S], moved labels that no stage's own matching has.
        own_by_category: int64 [K], labels of the own matching by category, over all stages.
        by_category: int64 [S, K], moved labels by category.
        by_size: int64 [S, 3], moved labels by area of the object's box: small, medium, large.
        by_iou: int64 [S, 10], moved labels by IoU of the learning query's box and the object.
    """

    own: list[int]
    kept: list[int]
    moved: list[int]
    origin: Ints
    foreign: list[int]
    own_by_category: Ints
    by_category: Ints
    by_size: Ints
    by_iou: Ints


def moved_labels(cascade: Cascade, categories: int) -> MovedLabels:
    """Compare the learned labels with the stages' own.

    Args:
        cascade: the stages.
        categories: number of categories.
    """
    stages = len(cascade.own)
    area = cascade.target_boxes[:, 2] * cascade.target_boxes[:, 3]
    size = np.searchsorted(_SIZE_BORDERS, area, side="right")
    own = [labels.keys(cascade.queries) for labels in cascade.own]
    origin = np.zeros((stages, stages), dtype=np.int64)
    by_category = np.zeros((stages, categories), dtype=np.int64)
    by_size = np.zeros((stages, len(SIZES)), dtype=np.int64)
    by_iou = np.zeros((stages, len(_IOU_BORDERS) - 1), dtype=np.int64)
    kept, moved, foreign = [], [], []
    for stage, labels in enumerate(cascade.learned):
        keys = labels.keys(cascade.queries)
        new = ~np.isin(keys, own[stage])
        kept.append(int((~new).sum()))
        moved.append(int(new.sum()))
        fresh = Labels(labels.object[new], labels.query[new])
        open_keys = keys[new]
        for source_stage in sorted(range(stages), key=lambda other: (abs(other - stage), other)):
            hit = np.isin(open_keys, own[source_stage])
            origin[stage, source_stage] = hit.sum()
            open_keys = open_keys[~hit]
        foreign.append(len(open_keys))
        by_category[stage] = np.bincount(cascade.category[fresh.object], minlength=categories)
        by_size[stage] = np.bincount(size[fresh.object], minlength=len(SIZES))
        by_iou[stage] = np.histogram(cascade.overlap(stage, fresh), _IOU_BORDERS)[0]
    counts = [len(labels) for labels in cascade.own]
    objects = np.concatenate([labels.object for labels in cascade.own])
    own_by_category = np.bincount(cascade.category[objects], minlength=categories)
    return MovedLabels(
        counts, kept, moved, origin, foreign, own_by_category, by_category, by_size, by_iou
    )


@dataclass(frozen=True, slots=True)
class Refinement:
    """Boxes of the queries matched in the last stage, traced back through the stages.

    Attributes:
        iou: [S], mean IoU with the object; None without objects.
        movement: [S - 1], mean of 1 - IoU of a query's boxes in two adjacent stages.
        all_movement: [S - 1], the same over all queries.
    """

    iou: list[float | None]
    movement: list[float | None]
    all_movement: list[float | None]


def refinement(cascade: Cascade) -> Refinement:
    """How far boxes move, and how well they fit, stage by stage."""
    last = cascade.own[-1]
    followed = cascade.boxes[:, cascade.image[last.object], last.query].astype(np.float64)
    flat = cascade.boxes.reshape(len(cascade.own), -1, 4).astype(np.float64)

    def movement(boxes: Floats) -> list[float | None]:
        return [_mean(1 - paired_iou(before, after)) for before, after in itertools.pairwise(boxes)]

    return Refinement(
        iou=[_mean(paired_iou(boxes, cascade.target_boxes[last.object])) for boxes in followed],
        movement=movement(followed),
        all_movement=movement(flat),
    )


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Duplicate detections of objects.

    Attributes:
        objects: objects with at least one detection of their category (IoU 0.5).
        claims: detections on them.
    """

    objects: int
    claims: int

    @property
    def surplus(self) -> float | None:
        """Detections beyond the first per object found; None if no object was found."""
        return (self.claims - self.objects) / self.objects if self.objects else None


def duplicates(truth: GroundTruth, found: Found, threshold: float) -> Duplicates:
    """Count detections by the object of their category that they overlap most, at least by IoU 0.5.

    Args:
        truth: the objects; crowds do not count.
        found: a stage's detections.
        threshold: minimum score of a detection that counts.
    """
    claims = np.zeros(len(truth), dtype=np.int64)
    kept = found.select(found.scores >= threshold)
    for rows, objects in _groups(truth, kept):
        iou = box_iou(kept.boxes_xywh[rows], truth.boxes_xywh[objects])
        hit = iou.max(axis=1) >= 0.5
        np.add.at(claims, objects[iou.argmax(axis=1)[hit]], 1)
    return Duplicates(objects=int((claims > 0).sum()), claims=int(claims.sum()))


def _groups(truth: GroundTruth, found: Found) -> list[tuple[Ints, Ints]]:
    """Detections and objects, crowds left out, of one image and category each."""
    count = len(truth.names)
    real = np.flatnonzero(~truth.crowd)
    slots = (truth.image * count + truth.category)[real]
    real = real[np.argsort(slots, kind="stable")]
    slots = np.sort(slots)
    claims = found.image * count + found.category
    order = np.argsort(claims, kind="stable")
    claims = claims[order]
    result = []
    for slot in np.intersect1d(slots, claims):
        start, stop = np.searchsorted(claims, [slot, slot + 1])
        first, last = np.searchsorted(slots, [slot, slot + 1])
        result.append((order[start:stop], real[first:last]))
    return result


def suppress(found: Found, threshold: float) -> Found:
    """Non-maximum suppression: drop what overlaps a better detection of its image and category.

    Args:
        found: detections, in any order.
        threshold: IoU above which a detection is dropped.
    """
    ranked = found.ranked(len(found))
    kept = np.ones(len(ranked), dtype=np.bool_)
    borders = np.flatnonzero(np.diff(ranked.image) | np.diff(ranked.category)) + 1
    for rows in np.split(np.arange(len(ranked)), borders):
        if len(rows) < 2:
            continue
        iou = box_iou(ranked.boxes_xywh[rows], ranked.boxes_xywh[rows])
        alive = np.ones(len(rows), dtype=np.bool_)
        for row in range(len(rows)):
            if alive[row]:
                alive[row + 1 :] &= iou[row, row + 1 :] <= threshold
        kept[rows] = alive
    return ranked.select(kept)


class StageSimilarity:
    """Linear CKA of query features between stages, accumulated batch by batch in constant memory.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
        section 3 (linear kernel, centred features).
    """

    def __init__(self) -> None:
        self.count = 0
        self._widths: list[int] = []
        self._sum: Floats = np.zeros(0)
        self._product: Floats = np.zeros((0, 0))

    def add(self, features: Sequence[Floats]) -> None:
        """Take features [n, C] of the same n queries in each of S stages."""
        rows = np.concatenate(features, axis=1, dtype=np.float64)
        if not self._widths:
            self._widths = [values.shape[1] for values in features]
            self._sum = np.zeros(rows.shape[1])
            self._product = np.zeros((rows.shape[1], rows.shape[1]))
        self.count += len(rows)
        self._sum += rows.sum(axis=0)
        self._product += rows.T @ rows  # of one array with itself: half the work of a product

    def matrix(self) -> Floats:
        """Similarity [S, S] from 0 to 1; 0 if a stage's features do not vary."""
        centred = self._product - np.outer(self._sum, self._sum) / self.count
        starts = np.cumsum([0, *self._widths[:-1]])
        norms = np.add.reduceat(np.add.reduceat(centred**2, starts, axis=0), starts, axis=1)
        norms = np.tril(norms) + np.tril(norms, -1).T  # the same in both halves to the last bit
        scale = np.sqrt(np.outer(norms.diagonal(), norms.diagonal()))
        return np.divide(norms, scale, out=np.zeros_like(norms), where=scale > 0)


@dataclass(frozen=True, slots=True)
class ImageErrors:
    """Errors in one image at IoU 0.5.

    Attributes:
        image: position of the image.
        objects: objects to find.
        missed: objects not found.
        wrong: detections that match no object.
    """

    image: int
    objects: int
    missed: int
    wrong: int


def hardest_images(
    truth: GroundTruth, found: Found, threshold: float, max_detections: int, count: int
) -> list[ImageErrors]:
    """The images with the most errors, missed plus wrong; the first in case of a tie.

    Args:
        truth: the objects.
        found: the detections.
        threshold: minimum score of a detection that counts.
        max_detections: maximum detections per category and image.
        count: maximum number of images; images without an error are not listed.
    """
    matches = match(truth, found.select(found.scores >= threshold), max_detections, np.array([0.5]))
    images = len(truth.image_ids)
    hit = matches.target[0] >= 0
    right = np.bincount(matches.found.image[hit], minlength=images)
    wrong = np.bincount(matches.found.image[~hit & ~matches.ignored[0]], minlength=images)
    objects = matches.objects.sum(axis=1)
    missed = objects - right
    order = np.argsort(-(missed + wrong), kind="stable")[:count]
    return [
        ImageErrors(int(row), int(objects[row]), int(missed[row]), int(wrong[row]))
        for row in order
        if missed[row] + wrong[row]
    ]


def paired_iou(found: Floats, truth: Floats) -> Floats:
    """IoU [N] of paired boxes xywh [N, 4]; 0 where both have no area."""
    corner = np.maximum(found[:, :2], truth[:, :2])
    far = np.minimum(found[:, :2] + found[:, 2:], truth[:, :2] + truth[:, 2:])
    overlap = np.maximum(far - corner, 0.0).prod(axis=1)
    union = found[:, 2:].prod(axis=1) + truth[:, 2:].prod(axis=1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _mean(values: Floats | Bools) -> float | None:
    return float(values.mean()) if len(values) else None
