"""What the sections about stages say."""

from __future__ import annotations

from typing import Any

import pytest

from detrelay.apps.report_stages import duplicates


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.5, 0.506, "NMS changes AP by +0.60 points: the detector needs it"),
        (0.5, 0.504, "NMS changes AP by +0.40 points: the detector needs none"),
        (0.5, 0.49, "NMS changes AP by -1.00 points: the detector needs none"),
        (0.5, 0.5004, "NMS leaves AP unchanged: the detector needs none"),
    ],
)
def test_nms_is_needed_from_half_a_point_on(before: float, after: float, said: str) -> None:
    counts = {"objects": 4, "claims": 5, "surplus": 0.25}
    stage: dict[str, Any] = {
        "stats": {"AP": before},
        "AP_after_nms": after,
        "duplicates": counts,
        "duplicates_after_nms": counts,
    }
    figures = {
        "about": {"score_threshold": 0.3, "nms_iou": 0.7},
        "stages": [stage],
        "beside": None,
    }
    assert said in duplicates(figures).shows
