"""LVIS: data that record for each image which categories were checked, and its figures.

The figures come from the back ends for COCO: what must not count is first removed or covered by a
crowd.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from detrelay.core.errors import DataError, one_line
from detrelay.core.evaluation.backends import AREAS, Accumulated, BackendName, accumulate
from detrelay.core.evaluation.coco_ap import IOU_50, IOU_75, CocoResult, mean_of_measured
from detrelay.core.evaluation.tables import Bools, Found, GroundTruth, Ints
from detrelay.core.plain_file import refuse_endless

MAX_DETECTIONS = 300  # per image, over all categories
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_EVERYWHERE = (-1e9, -1e9, 2e9, 2e9)


class _Image(msgspec.Struct):
    id: int
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Class(msgspec.Struct):
    id: int
    frequency: Literal["r", "c", "f"] | None = None


class _File(msgspec.Struct):
    images: list[_Image] = []
    categories: list[_Class] = []


@dataclass(frozen=True, slots=True)
class Federation:
    """Which categories were checked in which images.

    Attributes:
        absent: by image id, categories known to be absent.
        not_exhaustive: by image id, categories of which not all objects are annotated.
        frequency: "r", "c" or "f" by category id, for the number of training images that show it.
    """

    absent: Mapping[int, Sequence[int]]
    not_exhaustive: Mapping[int, Sequence[int]]
    frequency: Mapping[int, str]


def read_federation(path: Path) -> Federation | None:
    """The LVIS fields of a COCO json; None if no image has any.

    Raises:
        DataError: the file cannot be read, only some images say which categories were checked, or a
            frequency is none of r, c and f.
    """
    content = _read(path)
    images = content.images
    keys = ("neg_category_ids", "not_exhaustive_category_ids")
    missing = [image for image in images if None in (getattr(image, key) for key in keys)]
    if len(missing) == len(images) and all(
        getattr(image, key) is None for image in images for key in keys
    ):
        return None
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(images)} images lack {' or '.join(keys)}, such as "
            f"image {missing[0].id}; LVIS names both for each image"
        )
    return Federation(
        absent={image.id: image.neg_category_ids or () for image in images},
        not_exhaustive={image.id: image.not_exhaustive_category_ids or () for image in images},
        frequency={entry.id: entry.frequency for entry in content.categories if entry.frequency},
    )


def _read(path: Path) -> _File:
    try:
        refuse_endless(path)
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return msgspec.json.decode(raw, type=_File)
    except msgspec.DecodeError:
        pass  # json accepts more, such as NaN
    try:
        return msgspec.convert(json.loads(raw.decode("utf-8-sig")), _File)
    except (ValueError, RecursionError) as error:  # of msgspec too
        raise DataError(f"{path}: {one_line(error)}") from error


def prepared(
    truth: GroundTruth, found: Found, federation: Federation, max_detections: int
) -> tuple[GroundTruth, Found]:
    """Objects and detections that count, so that COCO's figures become those of LVIS.

    Only the best detections of an image are used. Of these, those of categories that were not
    checked in the image are removed. If a category is not annotated exhaustively, a crowd that
    covers the image absorbs unmatched detections, so that they do not count as wrong. Objects and
    detections without area are removed too, as in lvis.

    Args:
        truth: the objects.
        found: the detections.
        federation: which categories were checked.
        max_detections: maximum detections per image, over all categories.
    """
    found = found.ranked(max_detections, by_category=False)
    present = np.zeros((len(truth.image_ids), len(truth.names)), dtype=np.bool_)
    real = truth.areas > 0
    present[truth.image[real], truth.category[real]] = True
    open_ended = _table(truth, federation.not_exhaustive)
    looked_for = present | _table(truth, federation.absent)
    has_area = found.boxes_xywh[:, 2:].prod(axis=1) > 0
    found = found.select(looked_for[found.image, found.category] & has_area)
    image, category = np.nonzero(open_ended)
    count = len(image)
    covered = GroundTruth(
        image_ids=truth.image_ids,
        category_ids=truth.category_ids,
        names=truth.names,
        image=np.concatenate([truth.image[real], image]),
        category=np.concatenate([truth.category[real], category]),
        boxes_xywh=np.concatenate([truth.boxes_xywh[real], np.tile(_EVERYWHERE, (count, 1))]),
        areas=np.concatenate([truth.areas[real], np.ones(count)]),
        crowd=np.concatenate([np.zeros(real.sum(), np.bool_), np.ones(count, np.bool_)]),
    )
    return covered, found


def _table(truth: GroundTruth, listed: Mapping[int, Sequence[int]]) -> Bools:
    """Bool [I, K] of category ids by image id; other images and categories are ignored."""
    result = np.zeros((len(truth.image_ids), len(truth.names)), dtype=np.bool_)
    for row, image_id in enumerate(truth.image_ids.tolist()):
        known = np.isin(truth.category_ids, listed.get(image_id, ()))
        result[row, known] = True
    return result


class FederatedResult(CocoResult):
    """LVIS's figures; `max_detections` is per image, over all categories."""

    def limit(self, name: str) -> int:
        """Every figure uses the same detections."""
        return self.max_detections


def evaluate_federated(
    truth: GroundTruth,
    found: Found,
    federation: Federation,
    *,
    max_detections: int = MAX_DETECTIONS,
    backend: BackendName = "pycocotools",
) -> tuple[FederatedResult, Accumulated]:
    """LVIS's figures, and the values they are averaged from.

    Args:
        truth: from `prepared`.
        found: from `prepared`.
        federation: the frequencies of the categories.
        max_detections: as given to `prepared`.
        backend: the implementation.

    Reference:
        Gupta et al., "LVIS", CVPR 2019, and the package lvis 0.5.3, whose figures a test
        reproduces.
    """
    accumulated = accumulate(truth, found, [max_detections], backend)
    precision, recall = accumulated.precision[..., 0], accumulated.recall[..., 0]
    stats = {
        "AP": mean_of_measured(precision[..., 0]),
        "AP50": mean_of_measured(precision[IOU_50, ..., 0]),
        "AP75": mean_of_measured(precision[IOU_75, ..., 0]),
    }
    for area, label in enumerate(AREAS[1:], start=1):
        stats[f"AP_{label}"] = mean_of_measured(precision[..., area])
    groups = np.array([federation.frequency.get(id, "") for id in truth.category_ids.tolist()])
    for letter, label in FREQUENCIES.items():
        rows: Ints = np.flatnonzero(groups == letter)
        stats[f"AP_{label}"] = mean_of_measured(precision[:, :, rows, 0])
    stats[f"AR_{max_detections}"] = mean_of_measured(recall[..., 0])
    for area, label in enumerate(AREAS[1:], start=1):
        stats[f"AR_{label}"] = mean_of_measured(recall[..., area])
    per_category = {
        name: mean_of_measured(precision[:, :, row, 0]) for row, name in enumerate(truth.names)
    }
    return FederatedResult(stats, per_category, max_detections), accumulated
