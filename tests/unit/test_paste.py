"""Objects of other images pasted beside those of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detrelay.core.boxes import intersection
from detrelay.core.data.augmentation import build_train_transform
from detrelay.core.data.paste import Paste
from detrelay.core.data.sample import Sample
from detrelay.core.recipes.recipe import DataConfig


def picture(*boxes: tuple[int, int, int, int], ground: int = 0, label: int = 0) -> Sample:
    """An even ground, 120 high and 100 wide, with every object in the grey 100 + its label."""
    image = torch.full((3, 120, 100), ground, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        image[:, top:bottom, left:right] = 100 + label
    return Sample(
        image=image,
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        class_labels=torch.full((len(boxes),), label),
        image_id=7,
        original_size=(120, 100),
    )


def endless(*samples: Sample) -> Callable[[], Sample]:
    """Reads the samples in turn."""
    taken = iter(range(1000))
    return lambda: samples[next(taken) % len(samples)]


def test_pasted_objects_lie_where_their_boxes_say_and_cover_nothing() -> None:
    torch.manual_seed(0)
    own = picture((10, 20, 40, 60))
    added = 0
    for _ in range(30):
        other = picture((50, 30, 80, 60), ground=30, label=5)
        joined = Paste(count=3, scales=(0.5, 1.0)).join(own, endless(other))
        assert torch.equal(joined.boxes_xyxy[:1], own.boxes_xyxy)
        assert torch.equal(joined.image[:, 20:60, 10:40], own.image[:, 20:60, 10:40])
        assert joined.class_labels.tolist() == [0] + [5] * (len(joined.boxes_xyxy) - 1)
        boxes = joined.boxes_xyxy
        shared = intersection(boxes[:, None], boxes[None])
        assert torch.equal(shared, shared.diag().diag())
        for box in boxes[1:]:
            assert 14 <= (box[2:] - box[:2]).min() <= (box[2:] - box[:2]).max() <= 31
            left, top, right, bottom = box.round().int().tolist()
            inside = joined.image[0, top + 1 : bottom - 1, left + 1 : right - 1]
            assert (inside == 105).float().mean() > 0.9
        added += len(boxes) - 1
    assert added > 60  # of at most 90
    assert torch.equal(own.image, picture((10, 20, 40, 60)).image)  # not changed in place


def test_edges_of_pieces_do_not_tell_where_boxes_end() -> None:
    torch.manual_seed(1)
    other = picture((30, 30, 60, 60), ground=30, label=5)
    joined = Paste(count=1, scales=(1.0, 1.0)).join(picture(), endless(other))
    rows, columns = (joined.image[0] > 0).nonzero().unbind(1)
    left, top, right, bottom = joined.boxes_xyxy[0].tolist()
    assert columns.min() < left
    assert rows.min() < top
    assert columns.max() + 1 > right
    assert rows.max() + 1 > bottom


def test_objects_that_touch_others_and_empty_images_give_no_piece() -> None:
    torch.manual_seed(2)
    own = picture((10, 20, 40, 60))
    for other in (picture(), picture((10, 10, 50, 50), (40, 40, 90, 90), label=1)):
        joined = Paste(count=4).join(own, endless(other))
        assert torch.equal(joined.image, own.image)
        assert torch.equal(joined.boxes_xyxy, own.boxes_xyxy)


def test_nothing_is_pasted_where_there_is_no_place() -> None:
    full = picture((0, 0, 100, 120))
    joined = Paste(count=4).join(full, endless(picture((50, 30, 80, 60), label=1)))
    assert torch.equal(joined.image, full.image)


def test_paste_is_a_transform_of_the_list() -> None:
    listed = ({"name": "paste", "count": 1, "scales": [1, 1]}, {"name": "resize"})
    transform = build_train_transform(DataConfig(short_sides=(50,), transforms=listed))
    other = picture((50, 30, 80, 60), label=2)
    torch.manual_seed(0)
    sample = transform(picture(), another=endless(other))
    assert sample.class_labels.tolist() == [2]
    assert sample.image.shape == (3, 60, 50)
    torch.testing.assert_close(
        sample.boxes_xyxy[0, 2:] - sample.boxes_xyxy[0, :2], torch.tensor([15.0, 15.0])
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count must be at least 1, found 0"),
        ({"scales": (0.0, 1.0)}, "scales must be a range above 0, found 0 to 1"),
        ({"scales": (1.0, 0.5)}, "scales must be a range above 0, found 1 to 0.5"),
        ({"margin": -1.0}, "margin must be at least 0, found -1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Paste(**options)
