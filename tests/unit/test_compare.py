"""Which runs belong to one setting, and which cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detrelay.apps.compare import FinishedRun, group, read_run
from detrelay.core.recipes.recipe import Recipe, override


def finished(name: str, *settings: str) -> FinishedRun:
    return FinishedRun(Path("runs") / name, override(Recipe(), settings))


def test_runs_that_differ_by_their_seed_are_one_setting() -> None:
    settings = group(
        [
            finished("base-seed0", "train.seed=0"),
            finished("long_seed3", "train.seed=3", "train.epochs=24"),
            finished("other-name", "train.seed=1"),
        ]
    )
    names = {name: [run.folder.name for run in runs] for name, runs in settings.items()}
    assert names == {"base": ["base-seed0", "other-name"], "long": ["long_seed3"]}
    (folder,) = group([FinishedRun(Path("study/base/seed-0"), Recipe())])
    assert folder == "base"


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="two runs of a with the same seed"):
        group([finished("a"), finished("b")])
    with pytest.raises(ValueError, match="would both be called a, but their recipes differ"):
        group([finished("a"), finished("a-seed1", "train.seed=1", "train.epochs=24")])
    with pytest.raises(ValueError, match="would both be called a, but their recipes differ"):
        group([finished("a"), finished("more/a", "train.epochs=24")])


def test_a_run_that_is_not_finished_has_no_mean(tmp_path: Path) -> None:
    record = {"recipe": override(Recipe(), ["train.epochs=5"]).to_mapping()}
    (tmp_path / "training.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"the run is not finished \(it has no results.json\)"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    run = read_run(tmp_path, minutes=3.5)
    assert (run.folder, run.recipe.train.epochs, run.minutes) == (tmp_path, 5, 3.5)
