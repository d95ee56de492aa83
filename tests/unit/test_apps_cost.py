"""The cost of a detector, as a command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commands import command
from detrelay.apps import cost
from tiny_run import TINY, shrink_backbone


def test_all_settings_of_a_study_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink_backbone(monkeypatch)
    monkeypatch.setattr(cost, "in_own_process", lambda work, *given: work(*given))
    study = tmp_path / "reuse.toml"
    study.write_text(
        'about = "Reuse?"\nrecipe = "shapes"\nseeds = [0, 1]\nbaseline = "none"\n'
        '[settings.none]\nset = ["model.max_reused_filters=0"]\n[settings.all]\n'
    )
    code, out, err = command(
        cost.cost, cost.Arguments, capsys,
        *(study, "shapes", "--output", tmp_path / "cost", "--height", 64, "--width", 96),
        *("--repeats", 1, "--batch-size", 2, "--set", *TINY),
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads((tmp_path / "cost" / "cost.json").read_text())
    assert [row["name"] for row in rows] == ["reuse: none", "reuse: all", "shapes"]
    none, every, _ = rows
    assert "static adapters of reused filters" not in none["gflop"]
    assert every["gflop"]["static adapters of reused filters"] > 0
    for row in rows:
        assert row["inference"]["seconds"] > 0
        assert row["training"]["seconds"] > row["inference"]["seconds"]
        assert row["training"]["mebibytes"] > 0
    text = (tmp_path / "cost" / "cost.md").read_text()
    assert text.count("| reuse: all ") == 2
    assert "64 x 96 pixels, 2 at a time, 80 categories" in out
    code, _, err = command(cost.cost, cost.Arguments, capsys, "--output", tmp_path / "cost")
    assert code == 2
    assert "name a study or a recipe" in err
    code, _, err = command(
        cost.cost, cost.Arguments, capsys, "no_such_recipe", "--output", tmp_path / "cost"
    )
    assert code == 2
    assert "no_such_recipe" in err
