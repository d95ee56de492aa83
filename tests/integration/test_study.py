"""A study from its file to its tables, with tiny runs in this process instead of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from detrelay.apps import compare, study, train
from detrelay.core.engine import run_folder
from tiny_run import TINY, shrink_backbone, skip_pictures

SETTINGS = [*TINY, "train.epochs=1"]
FILE = f"""
about = "Whether filters help."
seeds = [0, 1]
baseline = "plain"
recipe = "shapes"
set = {json.dumps(SETTINGS)}

[settings.reuse]

[settings.plain]
assigner = "hungarian"
set = ["model.max_reused_filters=0"]
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)
    yield
    torch.set_num_threads(threads)


class Process:
    """Trains in this process what a command line asks for; one run can be made to fail."""

    started: list[list[str]]
    broken: str

    def __init__(self, words: list[str], log: Any) -> None:
        Process.started.append(words)
        assert words[1:3] == ["-m", "detrelay.apps.train"]
        arguments = tyro.cli(train.Arguments, args=words[3:])
        self.returncode = 7
        if not Process.broken or Process.broken not in str(arguments.output):
            self.returncode = train.train(arguments)

    def poll(self) -> int:
        return self.returncode


class AtOnce:
    """Runs what is submitted in this thread, since training listens to signals."""

    def __init__(self, count: int) -> None:
        assert count == 1

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    Process.started, Process.broken = [], ""
    monkeypatch.setattr(study, "start", Process)
    monkeypatch.setattr(study, "ThreadPoolExecutor", AtOnce)
    return Process


def test_a_study_trains_its_grid_resumes_and_compares(
    processes: type[Process], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "reuse.toml", tmp_path / "out"
    file.write_text(FILE)
    arguments = study.Arguments(study=str(file), output=output, backend="hotcoco")

    processes.broken = "plain/seed-1"
    assert study.study(arguments) == 1
    assert len(processes.started) == 4
    table = (output / "comparison.md").read_text()
    assert "no mean: seed 1 missing" in table
    assert "| reuse | 0, 1 | " in table
    rows = json.loads((output / "comparison.json").read_text())["settings"]
    assert [row["name"] for row in rows] == ["plain", "reuse"]
    assert rows[0]["ap"] is rows[1]["difference"] is None

    processes.broken, processes.started[:] = "", []
    assert study.study(arguments) == 0
    (words,) = processes.started  # only what was missing
    assert words[-1] != "--resume"
    assert str(output / "plain" / "seed-1") in words
    rows = json.loads((output / "comparison.json").read_text())["settings"]
    assert all(row["ap"] is not None and row["minutes"] > 0 for row in rows)
    assert rows[1]["difference"]["mean"] == pytest.approx(
        rows[1]["ap"]["mean"] - rows[0]["ap"]["mean"], abs=2e-6
    )
    assert (output / "comparison.tex").read_text().startswith(r"\begin{tabular}")
    assert (output / "curves.png").stat().st_size > 1000
    recipe = json.loads((output / "reuse" / "seed-1" / run_folder.RECORD).read_text())["recipe"]
    assert recipe["train"]["seed"] == 1
    assert recipe["train"]["epochs"] == 1

    # the same runs named one by one
    capsys.readouterr()
    folders = [output / name / f"seed-{seed}" for name in ("plain", "reuse") for seed in (0, 1)]
    again = tmp_path / "again"
    assert compare.compare_runs(compare.Arguments(tuple(folders), again, backend="hotcoco")) == 0
    others = json.loads((again / "comparison.json").read_text())["settings"]
    assert [row["name"] for row in others] == ["plain", "reuse"]
    for row, other in zip(rows, others, strict=True):
        assert other["ap"] == row["ap"]
        assert other["difference"] == row["difference"]

    # a finished run under another recipe
    changed = study.Arguments(study=str(file), output=output, set=(("train.weight_decay=0.5",),))
    with pytest.raises(ValueError, match=r"trained with another recipe: .*train\.weight_decay"):
        study.study(changed)
    (folders[3] / run_folder.RESULTS).unlink()
    with pytest.raises(ValueError, match="the run is not finished"):
        compare.compare_runs(compare.Arguments(tuple(folders), again))
    assert study.command(
        study.make_jobs(study.read_study(file), arguments)[2], "accelerate launch"
    )[:3] == ["accelerate", "launch", "-m"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds = [0, 1]", "seeds = [0, 0]"), "seeds must be different whole numbers"),
        (("seeds = [0, 1]", ""), "seeds must be a list of whole numbers, found None"),
        (('"plain"', '"plane"'), "baseline 'plane' is not a setting; did you mean plain?"),
        (("assigner =", "asigner ="), "unknown key settings.plain.asigner; did you mean assigner?"),
        (('= "hungarian"', "= 3"), "settings.plain.assigner must be text, found 3"),
        (('["model.max', '[0, "model.max'), "settings.plain.set must be a list"),
        (("[settings.plain]", '[settings."../x"]'), "becomes that of a folder"),
        (("about =", "about"), "not TOML"),
        (("filters=0", "filtres=0"), "setting plain: "),
    ],
)
def test_malformed_studies_are_refused_before_any_run(
    change: tuple[str, str],
    message: str,
    processes: type[Process],
    tmp_path: Path,
) -> None:
    file = tmp_path / "study.toml"
    file.write_text(FILE.replace(*change))
    with pytest.raises(ValueError, match=r"\w") as error:
        study.study(study.Arguments(study=str(file), output=tmp_path / "out"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not processes.started


def test_every_study_of_the_package_resolves(tmp_path: Path) -> None:
    files = sorted(study.STUDIES.glob("*.toml"))
    assert len(files) >= 8
    for file in files:
        plan = study.read_study(file)
        assert len(plan.seeds) >= 3
        arguments = study.Arguments(study=file.stem, output=tmp_path, data=(Path("my_data"),))
        jobs = study.make_jobs(plan, arguments)
        study.check(jobs)
        recipes = {json.dumps(train.resolve(job.arguments).to_mapping()) for job in jobs}
        assert len(recipes) == len(jobs)  # no setting is another one under a second name


def test_seeds_and_recipe_of_the_command_line_take_the_place_of_the_studys(tmp_path: Path) -> None:
    words = ["targets", "--output", str(tmp_path), "--recipe", "shapes_dino", "--seeds", "4", "2"]
    arguments = tyro.cli(study.Arguments, args=words)
    jobs = study.make_jobs(study.plan_of(arguments), arguments)
    study.check(jobs)
    assert len(jobs) == 28
    assert [jobs[0].name, jobs[14].name] == ["hungarian/seed-4", "hungarian/seed-2"]
    assert {train.resolve(job.arguments).head for job in jobs} == {"dino"}
    with pytest.raises(ValueError, match=r"--seeds must differ, found \[1, 1\]"):
        study.plan_of(tyro.cli(study.Arguments, args=[*words[:3], "--seeds", "1", "1"]))


def test_runs_of_one_setting_are_those_that_differ_by_the_seed() -> None:
    from detrelay.core.recipes.recipe import load_recipe, override

    recipe = load_recipe(None)

    def made(folder: str, *settings: str) -> compare.FinishedRun:
        return compare.FinishedRun(Path(folder), override(recipe, list(settings)))

    runs = [
        made("runs/dino-seed0"), made("runs/dino-seed1", "train.seed=1"),
        made("runs/long", "train.epochs=99"), made("x/wide/seed-3", "train.epochs=98"),
    ]  # fmt: skip
    assert {name: len(found) for name, found in compare.group(runs).items()} == {
        "dino": 2, "long": 1, "wide": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="two runs of dino with the same seed"):
        compare.group([runs[0], made("runs/dino-again")])
    with pytest.raises(ValueError, match="would both be called long"):
        compare.group([runs[2], made("other/long", "train.epochs=97", "train.seed=5")])
