"""Charts show the numbers they are given."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib import pyplot as plt

from detrelay.apps.charts import calibration, confusion, errors
from detrelay.core.evaluation.analysis import Calibration, Confusion
from detrelay.core.evaluation.tide import KINDS, ErrorBreakdown


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def test_bars_of_errors_are_gains_in_points() -> None:
    gains = {kind: number / 100 for number, kind in enumerate(KINDS, start=1)}
    counts = {kind: 10 * number for number, kind in enumerate(KINDS, start=1)}
    figure = errors(ErrorBreakdown(0.25, counts, gains, 0.1, 0.2, 100, 0.5, 0.1))
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([1, 2, 3, 4, 5, 6])
    texts = [text.get_text() for text in axis.texts]
    assert texts == [f"{count} errors" for count in counts.values()]
    assert "AP 25.0" in axis.get_title()


def test_cells_of_the_confusion_hold_counts_and_colours_of_their_row() -> None:
    matrix = Confusion(np.array([[3, 0, 1], [0, 0, 0], [2, 0, 0]]), 0, 0.4)
    figure = confusion(matrix, ["cat", "dog"])
    axis = figure.axes[0]
    assert sorted(text.get_text() for text in axis.texts) == ["1", "2", "3"]
    (picture,) = axis.images
    assert picture.get_array().tolist() == [[0.75, 0, 0.25], [0, 0, 0], [1, 0, 0]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["cat", "dog", "missed"]


def test_calibration_leaves_empty_bins_at_zero() -> None:
    figure = calibration(Calibration([0, 4], [None, 0.8], [None, 0.75], 0.05))
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches] == [0, 0.75]
    assert [bar.get_height() for bar in lower.patches] == [0, 4]
    assert "expected error 5.0 %" in upper.get_title()
