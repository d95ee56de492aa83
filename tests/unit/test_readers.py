"""Every format gives the same images and boxes; oddities are reported or rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.data.places import Found, open_place
from factories_formats import TRUTH, WRITERS, write_format

Rows = dict[str, list[tuple[str, float, float, float, float]]]


def rows_of(found: Found) -> Rows:
    """Name and corners of the boxes of each image, in the order of the places."""
    rows: Rows = {}
    for part in found.splits.values():
        assert part.images.missing() == []
        for image in range(len(part)):
            boxes = part.boxes_xywh[part.box_image == image]
            labels = part.box_class[part.box_image == image]
            rows[Path(part.images.name(image)).stem] = sorted(
                (part.categories[label].name, x, y, x + w, y + h)
                for label, (x, y, w, h) in zip(labels.tolist(), boxes.tolist(), strict=True)
            )
            height, width = part.sizes[image]
            assert (width, height) == TRUTH[Path(part.images.name(image)).stem][0]
    return rows


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_boxes(name: str, tmp_path: Path) -> None:
    place, format_name = write_format(name, tmp_path)
    found = open_place(place)
    assert found.format == format_name
    rows = rows_of(found)
    for stem, (_, boxes) in TRUTH.items():
        if not boxes and stem not in rows:  # formats that cannot name an image without objects
            assert name in ("csv_tensorflow", "csv_openimages")
            continue
        assert len(rows[stem]) == len(boxes)
        for ours, truth in zip(rows[stem], sorted(boxes), strict=True):
            assert ours[0] == truth[0]
            assert ours[1:] == pytest.approx(truth[1:], abs=0.01)
    ids = [number for part in found.splits.values() for number in part.image_ids.tolist()]
    boxes = [number for part in found.splits.values() for number in part.box_ids.tolist()]
    assert len(set(ids)) == len(ids)
    assert len(set(boxes)) == len(boxes)
    assert len({part.categories for part in found.splits.values()}) == 1
    summary = found.summary()
    assert place.partition(":")[2] in summary or place in summary
    assert "5 boxes, 3 categories" in summary
