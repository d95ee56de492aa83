"""A fingerprint of a split at the start of a run, small enough for the record of the run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.sample import some


def fingerprint(annotations: Annotations) -> dict[str, Any]:
    """The categories; of everything else, counts and hashes.

    File names are omitted, since a folder may move; sizes and times of the files stand in for their
    pixels, which would take long to read.
    """
    images = np.column_stack([annotations.image_ids, annotations.sizes])
    boxes = np.column_stack(
        [
            annotations.image_ids[annotations.box_image],
            annotations.box_class,
            annotations.crowd,
        ]
    )
    files = _files(annotations)
    return {
        "categories": [[category.id, category.name] for category in annotations.categories],
        "num_images": len(annotations),
        "images": _hash(images),
        "images_in_any_order": _hash(images[np.lexsort(images.T)]),
        "num_boxes": len(boxes),
        "boxes": _hash(boxes, annotations.boxes_xywh, annotations.areas),
        "file_sizes": _hash(files[:, 0]),
        "file_times": _hash(files[:, 1]),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, moved: bool) -> list[str]:
    """The differences between two fingerprints, in a few words each.

    Args:
        before: from the start of the run.
        now: of the current data.
        moved: the files are elsewhere, so that their times mean nothing.
    """
    found = []
    if before["categories"] != now["categories"]:
        found.append(f"categories ({_names(before)} -> {_names(now)})")
    if before["num_images"] != now["num_images"]:
        found.append(f"number of images ({before['num_images']} -> {now['num_images']})")
    elif before["images_in_any_order"] != now["images_in_any_order"]:
        found.append("ids or sizes of images")
    elif before["images"] != now["images"]:
        found.append("order of the images")
    elif before["file_sizes"] != now["file_sizes"]:
        found.append("image files (other sizes on disk)")
    elif not moved and before["file_times"] != now["file_times"]:
        found.append("image files (written since)")
    if before["num_boxes"] != now["num_boxes"]:
        found.append(f"number of boxes ({before['num_boxes']} -> {now['num_boxes']})")
    elif before["boxes"] != now["boxes"]:
        found.append("boxes (same number)")
    return found


def _names(facts: Mapping[str, Any]) -> str:
    return some([name for _, name in facts["categories"]], examples=10)


def _files(annotations: Annotations) -> NDArray[np.int64]:
    """Bytes and modification time in ns of each image file; empty if images are not files."""
    rows = []
    for index in range(len(annotations)):
        file = annotations.images.open(index)
        if not isinstance(file, Path):
            break
        status = os.stat(file)
        rows.append((status.st_size, status.st_mtime_ns))
    return np.array(rows, dtype=np.int64).reshape(-1, 2)


def _hash(*columns: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]


def all_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, moved: Sequence[str]
) -> dict[str, list[str]]:
    """`differences` of each split that is in both and differs.

    Args:
        before: fingerprints by split.
        now: likewise.
        moved: splits whose files are elsewhere.
    """
    found = {
        split: differences(before[split], now[split], moved=split in moved)
        for split in now
        if split in before
    }
    return {split: words for split, words in found.items() if words}
