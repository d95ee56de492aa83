"""A step with a non-finite value: what is saved of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from detrelay.apps.replay import Arguments as Replay
from detrelay.apps.replay import replay
from detrelay.core.engine.failure import load_failure
from tiny_run import tiny_run


def test_a_failure_that_went_away_and_files_that_are_none(
    small_and_silent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.accumulation_steps=2"]
    assert tiny_run(tmp_path / "run", *settings, "train.batch_size=2") == 1
    (file,) = (tmp_path / "run").glob("failures/*/process_0.safetensors")
    batches, _ = load_failure(file)
    assert [len(batch["labels"]) for batch in batches] == [2, 2]
    weights = load_file(file.parent / "model.safetensors")
    save_file(
        {key: torch.zeros_like(value) for key, value in weights.items()},
        file.parent / "model.safetensors",
        {"format": "pt"},
    )
    capsys.readouterr()
    assert replay(Replay(file)) == 0
    assert "every loss and gradient is finite" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model\.safetensors: not the batches of a failed step"):
        load_failure(file.parent / "model.safetensors")
    with pytest.raises(ValueError, match="no such file; expected the batches that training saved"):
        replay(Replay(tmp_path / "none"))
