"""Evaluators by name, and the figure by which models are compared."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from detrelay.core.evaluation.coco_ap import CocoResult, evaluate_coco
from detrelay.core.evaluation.evaluators import CocoEvaluator, build_evaluator
from detrelay.core.evaluation.tables import Detections
from factories_scores import random_case
from tiny_run import shrink_backbone, tiny_run


class Halving:
    """COCO's figures after one that gets worse with each evaluation."""

    def __init__(self, start: float) -> None:
        self.value = start

    def __call__(self, ground_truth: Any, detections: Any, *, max_detections: int) -> CocoResult:
        result = evaluate_coco(ground_truth, detections, max_detections=max_detections)
        self.value /= 2
        return replace(result, stats={"halved": self.value, **result.stats})


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ModuleType("my_evaluator")
    mine.Halving = Halving  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_evaluator", mine)


def test_coco_is_the_evaluator_by_name() -> None:
    truth, rows = random_case()
    evaluator = build_evaluator("coco", {})
    assert evaluator == CocoEvaluator()
    result = evaluator(truth, Detections.from_rows(rows), max_detections=100)
    assert result == evaluate_coco(truth, rows)
    assert result.main == ("AP", result.stats["AP"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cocoa", {}, "unknown evaluator 'cocoa'; did you mean 'coco'"),
        ("coco", {"backends": "x"}, "has no option 'backends'; did you mean 'backend'"),
        ("my_evaluator:Doubling", {}, "my_evaluator has no class 'Doubling'"),
        ("my_evaluator:Halving", {}, "missing 1 required positional argument: 'start'"),
    ],
)
@pytest.mark.usefixtures("module")
def test_unknown_names_and_options_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_evaluator(name, options)


@pytest.mark.usefixtures("module")
def test_its_first_figure_chooses_the_best_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink_backbone(monkeypatch)
    settings = ("train.evaluator=my_evaluator:Halving", "train.evaluator_options={start=0.8}")
    assert tiny_run(tmp_path / "run", *settings) == 0
    best = json.loads((tmp_path / "run/best/training.json").read_text())["measured"]
    assert best["epoch"] == 1  # of two
    assert next(iter(best["stats"].items())) == ("halved", 0.4)
    assert "AP" in best["stats"]
    assert "(epoch 1, halved 0.4000)" in capsys.readouterr().out
