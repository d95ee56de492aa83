"""The report next to an exported file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from detrelay.core.export.comparison import Difference, Rounding, Times
from detrelay.core.export.quantization import Trial
from detrelay.core.export.report import Bounds, ExportReport, Precision


def report(**changes: object) -> ExportReport:
    values: dict[str, object] = {
        "format": "onnx",
        "file": "model.onnx",
        "bytes": 2_500_000,
        "facts": {"opset": 18},
        "versions": {"torch": "2.11"},
        "bounds": Bounds(1e-3, 1e-4, 0.001),
        "differences": [Difference(1, 64, 96, 1e-5, 2e-4), Difference(2, 64, 64, 3e-5, 1e-5)],
        "times": Times(64, 64, 0.2, 0.1, 5, 1.5),
        "precision": Precision("val.json", 9, 0.5, 0.4995, (-0.02, 0.0)),
    }
    return ExportReport(**{**values, **changes})  # type: ignore[arg-type]


def test_what_is_beyond_its_bound_is_said() -> None:
    found = report()
    assert (found.logits, found.boxes) == (3e-5, 2e-4)
    assert found.refusals() == ["boxes by 0.0002 (bound 0.0001)"]
    assert report(bounds=Bounds(1e-3, 1e-3, 0.001)).refusals() == []
    worse = Precision("val.json", 9, 0.5, 0.4, (-0.2, 0.0))
    assert "AP by 0.1" in report(precision=worse).refusals()[-1]
    broken = [Difference(1, 64, 96, float("nan"), 0.0)]
    assert report(differences=broken).refusals()[0].startswith("logits by nan")


def test_what_rounding_explains_is_allowed() -> None:
    bounds = Bounds(1e-3, 1e-4, 0.001, roundings=2.0)
    assert report(bounds=bounds).refusals() == ["boxes by 0.0002 (bound 0.0001)"]
    explained = report(bounds=bounds, rounding=Rounding(1e-6, 1.1e-4))
    assert explained.refusals() == []
    assert "by 1.0e-06 and 1.1e-04; 2 times as much is allowed" in explained.page()
    less = report(bounds=bounds, rounding=Rounding(1e-6, 0.9e-4))
    assert less.refusals() == ["boxes by 0.0002 (bound 0.00018)"]
    assert report(bounds=bounds, rounding=Rounding(0.0, 0.0)).refusals() == [
        "boxes by 0.0002 (bound 0.0001)"
    ]
    broken = report(bounds=bounds, rounding=Rounding(math.inf, math.inf))
    assert broken.refusals() == ["boxes by 0.0002 (bound 0.0001)"]


def test_the_page_holds_the_figures() -> None:
    page = report().page()
    for text in (
        "2.5 MB, opset 18, torch 2.11.",
        "| 1 | 64 | 96 | 1.0e-05 | 2.0e-04 |",
        "200 ms in PyTorch, 100 ms exported, 2.00 times as fast",
        "50.00 in PyTorch, 49.95 exported, difference -0.05 [-2.00, +0.00] (bound 0.1)",
        "**Beyond its bounds: boxes by",
    ):
        assert text in page
    assert "AP on" not in report(precision=None).page()


def test_parts_that_returned_to_float_are_named() -> None:
    trials = [
        Trial("float32", 9, 0.5, 0.2, True),
        Trial("neck", 3, 0.5, 0.1, True),
        Trial("decoder", 6, 0.5, 0.1, False, returned=True),
    ]
    page = report(trials=trials).page()
    assert "| neck | 3 | 50.00 | +0.00 | 100 | int8 |" in page
    assert "| decoder | 6 | 50.00 | +0.00 | 100 | float32 (returned) |" in page
    assert "lost too much on val.json with it: decoder. AP there was measured 2 times." in page


def test_both_files_are_written(tmp_path: Path) -> None:
    report().write(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["beyond_bounds"] == ["boxes by 0.0002 (bound 0.0001)"]
    assert content["times"]["rounds"] == 5
    assert (tmp_path / "report.md").read_text() == report().page()
    assert pytest.approx(2e-4) == content["differences"][0]["boxes"]
