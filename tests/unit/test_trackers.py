"""Trackers: missing, unknown, rejected, and one that writes."""

from __future__ import annotations

from pathlib import Path

import pytest

import detrelay.apps.train as train_app
from detrelay.apps.trackers import check_trackers
from detrelay.core.errors import RecipeError
from tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


def test_a_tracker_that_is_missing_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(RecipeError, match="wandb is not installed; pip install wandb"):
        check_trackers(("wandb",))
    with pytest.raises(RecipeError, match="unknown tracker tensorbord; did you mean tensorboard"):
        check_trackers(("tensorbord",))


def test_a_tracker_that_cannot_start_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no key\nlog in")

    monkeypatch.setattr(train_app, "check_trackers", lambda names: None)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    with pytest.raises(RecipeError, match=r"trackers=wandb: cannot start \(no key log in\)"):
        tiny_run(tmp_path / "run", 'train.trackers=["wandb"]')
    assert not (tmp_path / "run").exists()


def test_tensorboard_files(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "run", "train.epochs=1", 'train.trackers=["tensorboard"]') == 0
    assert list((tmp_path / "run").glob("detrelay/events.out.*"))
