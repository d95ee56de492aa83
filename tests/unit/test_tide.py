"""Kinds of error: by hand and against tidecv."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detrelay.core.evaluation.tide import error_breakdown
from factories_scores import (
    PETS_FOUND,
    PETS_TRUTH,
    placed,
    random_case,
)


def test_errors_by_hand() -> None:
    result = error_breakdown(*placed(PETS_TRUTH, PETS_FOUND))
    assert result.counts == {
        "classification": 1, "localization": 1, "both": 1, "duplicate": 1, "background": 2,
        "missed": 1,
    }  # fmt: skip  # the one in the crowd is sorted too, but no mistake
    # cats: right, wrong, wrong, wrong, wrong of 3 objects; recall 1/3 at precision 1; dogs: 0
    base = 34 / 101 / 2
    assert result.ap == pytest.approx(base)
    assert result.gains["localization"] == pytest.approx((34 + 33 / 2) / 101 / 2 - base)
    assert result.gains["classification"] == pytest.approx(1 / 2)  # the dog before the stray dog
    assert result.gains["missed"] == pytest.approx((51 - 34) / 101 / 2)
    assert result.gains["duplicate"] == 0


@pytest.mark.parametrize(
    "name",
    ["random", "aquarium", "bccd", "cards", "chess", "coco_fake100", "coco_mini", "trees"],
)
def test_errors_are_those_of_tidecv(
    name: str, assets: Path, request: pytest.FixtureRequest
) -> None:
    expected = json.loads((assets / "tide" / "tidecv.json").read_text())["figures"][name]
    if name == "random":
        case = random_case()
    else:
        folder = request.getfixturevalue("real_data") / name
        files = json.loads((folder / "expected_eval.json").read_text())
        case = tuple(
            json.loads((folder / files[key]).read_text()) for key in ("ground_truth", "detections")
        )
    result = error_breakdown(*placed(*case))
    assert result.counts == expected["counts"]
    assert 100 * result.ap == pytest.approx(expected["ap"], abs=1e-9)
    assert {kind: 100 * gain for kind, gain in result.gains.items()} == pytest.approx(
        expected["gains"], abs=1e-9
    )
    assert 100 * result.false_positives == pytest.approx(expected["false_positives"], abs=1e-9)
    assert 100 * result.false_negatives == pytest.approx(expected["false_negatives"], abs=1e-9)
