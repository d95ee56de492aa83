"""Back ends agree, accept empty input, and are rejected by name."""

from __future__ import annotations

import sys

import pytest

from detrelay.core.evaluation.backends import BACKENDS, fastest_backend
from detrelay.core.evaluation.coco_ap import (
    evaluate_coco,
)
from factories_scores import HAND_FOUND, HAND_TRUTH, random_case, truth


@pytest.mark.parametrize("limit", [1, 5, 100, 300])
def test_back_ends_agree_to_the_bit(limit: int) -> None:
    ground_truth, detections = random_case()
    both = [
        evaluate_coco(ground_truth, detections, max_detections=limit, backend=backend)
        for backend in BACKENDS
    ]
    assert both[0] == both[1]
    assert both[0].stats["AP"] > 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_back_ends_take_nothing(backend: str) -> None:
    nothing_found = evaluate_coco(HAND_TRUTH, [], backend=backend)
    assert nothing_found.per_category == {"cat": 0.0, "dog": -1.0}
    nothing_to_find = evaluate_coco(truth([]), HAND_FOUND, backend=backend)
    assert set(nothing_to_find.stats.values()) == {-1.0}


def test_unknown_and_missing_back_ends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown back end 'cuda'; known are pycocotools"):
        evaluate_coco(HAND_TRUTH, HAND_FOUND, backend="cuda")
    assert fastest_backend() == "hotcoco"
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert fastest_backend() == "pycocotools"
    with pytest.raises(ValueError, match=r"not installed; pip install 'detrelay\[fast\]'"):
        evaluate_coco(HAND_TRUTH, HAND_FOUND, backend="hotcoco")
