"""What an update counts, and what is logged of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detrelay.core.engine.logging import read_metrics
from detrelay.core.engine.update import Update, assignment_counts
from detrelay.core.structures import Assignment, Pairs
from tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


def pairs(*rows: tuple[int, int]) -> Pairs:
    query, target = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Pairs(torch.zeros_like(query), query, target)


def test_matches_and_moved_labels_are_counted_stage_by_stage() -> None:
    own = pairs((0, 0), (3, 1))
    lent = Assignment(classes=pairs((3, 1), (5, 0), (6, 1)), boxes=own)
    plain = Assignment(classes=own, boxes=own)
    assignments = {"decoder": (plain, lent), "denoising": (plain,)}
    update = Update(torch.tensor(0.0), {}, torch.tensor(0.0), [assignments, assignments])
    tags, counts = assignment_counts(update, {"decoder", "proposals"})
    assert tags == ["decoder/0", "decoder/1"]
    assert counts.tolist() == [[4, 4, 0], [4, 6, 4]]


def test_the_log_holds_matches_moved_labels_and_memory(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "run", "train.epochs=1", "assigner.options.iou_threshold=0") == 0
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    stages = [f"decoder/{index}" for index in range(3)]
    assert list(line["matches_per_image"]) == list(line["moved_labels_share"]) == stages
    assert all(1 <= value <= 8 for value in line["matches_per_image"].values())
    # nothing is out of reach at threshold 0, so other stages lend
    assert 0 < line["moved_labels_share"]["decoder/0"] < 1
    assert line["peak_memory_mib"] > 10
