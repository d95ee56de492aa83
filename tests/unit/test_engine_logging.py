"""The log of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.core.engine.logging import MetricsLog, Progress, read_metrics


def test_trackers_get_the_numbers_of_the_log(tmp_path: Path) -> None:
    told: list[tuple[dict[str, float], int]] = []
    log = MetricsLog(
        tmp_path / "metrics.jsonl", forward=lambda values, step: told.append((values, step))
    )
    log.write("train", 3, {"loss": 2.5, "losses": {"decoder/0/l1": 0.5}, "note": "a", "x": None})
    log.write("evaluation", 3, {"AP": 0.25, "AP75": float("nan")})
    assert told == [
        ({"train/loss": 2.5, "train/losses/decoder/0/l1": 0.5}, 3),
        ({"evaluation/AP": 0.25}, 3),
    ]


def test_the_log_rewinds_to_before_the_evaluation_of_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for kind, step in [("train", 1), ("train", 2), ("evaluation", 2), ("train", 3)]:
        log.write(kind, step, {"loss": float("nan")})
    with log.path.open("a") as file:
        file.write('{"kind": "tr')
    log.rewind(2)
    lines = read_metrics(log.path)
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2)]
    assert lines[0]["loss"] is None  # NaN is no JSON
    assert log.path.read_text().endswith("\n")


def test_a_log_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"ki\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)


def test_time_left_counts_the_steps_of_this_start_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 60.0, 60.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress(total=110, done=100)
    progress.advance()
    progress.report(3, {"loss": 1.0})
    assert capsys.readouterr().out == "step 101/110  epoch 3  loss 1  time left 9:00\n"
