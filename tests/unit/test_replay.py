"""Replay of a failed step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detrelay.apps.replay import Arguments as Replay
from detrelay.apps.replay import replay
from tiny_run import tiny_run


def test_diverging_training_ends_in_one_line_and_keeps_the_checkpoint(
    small_and_silent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every=1"]
    assert tiny_run(tmp_path / "run", *settings) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: non-finite ")
    assert "in step 2, whose batch holds the image ids [" in line
    assert "last checkpoint is kept" in line
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    file = Path(line.partition("detrelay replay --file ")[2])
    capsys.readouterr()
    assert replay(Replay(file)) == 1
    then, now = capsys.readouterr().out.strip().splitlines()
    # the same losses, in the same stage, of the same images
    assert then.endswith(f"then: {now.removeprefix('now: ')}")
    facts = json.loads(file.with_suffix(".json").read_text())
    assert (facts["step"], facts["progress"]) == (2, 1 / 6)
