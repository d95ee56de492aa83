"""Class scores and boxes to detections in numpy, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detrelay.core.errors import NonFiniteOutput
from detrelay.core.export.detections import Detection, detections_of

# two queries, two classes; the boxes overlap by 0.6
LOGITS = np.array([[[2.0, -9.0], [1.0, 0.0]]], dtype=np.float32)
BOXES = np.array([[[0.5, 0.5, 0.5, 1.0], [0.625, 0.5, 0.5, 1.0]]], dtype=np.float32)


def found(**changes: Any) -> Detection:
    options: dict[str, Any] = {"threshold": 0.1, "top_k": 9, "clip": True}
    (result,) = detections_of(
        LOGITS, BOXES, [(100, 200)], **{**options, "nms_iou_threshold": None, **changes}
    )
    return result


def test_the_best_pairs_of_query_and_class_come_first() -> None:
    result = found()
    expected = [1 / (1 + np.exp(-logit)) for logit in (2.0, 1.0, 0.0)]
    assert result["scores"].tolist() == pytest.approx(expected, rel=1e-6)
    assert result["labels"].tolist() == [0, 0, 1]
    assert result["boxes"].tolist() == [[50, 0, 150, 100], [75, 0, 175, 100], [75, 0, 175, 100]]
    assert found(top_k=1)["labels"].tolist() == [0]


def test_the_threshold_is_exclusive() -> None:
    assert len(found(threshold=0.5)["scores"]) == 2
    assert len(found(threshold=0.49)["scores"]) == 3


def test_boxes_of_one_class_suppress_each_other() -> None:
    # intersection 75 x 100, union 125 x 100
    assert found(nms_iou_threshold=0.61)["labels"].tolist() == [0, 0, 1]
    assert found(nms_iou_threshold=0.59)["labels"].tolist() == [0, 1]
    assert found(nms_iou_threshold=0.59, top_k=1)["labels"].tolist() == [0]


def test_boxes_are_cut_where_asked() -> None:
    wide = BOXES * np.array([1, 1, 3, 1], dtype=np.float32)
    for clip, left in ((True, 0), (False, -50)):
        (result,) = detections_of(
            LOGITS, wide, [(100, 200)], threshold=0.8, top_k=1, clip=clip, nms_iou_threshold=None
        )
        assert result["boxes"][0, 0] == left


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(NonFiniteOutput, match="are not finite"):
        detections_of(
            LOGITS * np.nan,
            BOXES,
            [(9, 9)],
            threshold=0,
            top_k=1,
            clip=True,
            nms_iou_threshold=None,
        )
