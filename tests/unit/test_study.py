"""A grid of settings and seeds: how it is read, and the runs that it starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from detrelay.apps.study import (
    Arguments,
    StudyError,
    command,
    is_finished,
    make_jobs,
    read_minutes,
    read_study,
    study_file,
)

STUDY = """
about = "What labels do."
seeds = [0, 7]
baseline = "plain"
recipe = "shapes"
set = ["train.epochs=2"]
[settings.plain]
assigner = "hungarian"
[settings.wide]
set = ["model.num_queries=300"]
"""


def written(tmp_path: Path, text: str = STUDY) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(text)
    return path


def test_settings_take_what_the_study_says_for_all(tmp_path: Path) -> None:
    plan = read_study(written(tmp_path))
    assert (plan.seeds, plan.baseline) == ((0, 7), "plain")
    plain, wide = plan.settings["plain"], plan.settings["wide"]
    assert (plain.recipe, plain.assigner, plain.set) == ("shapes", "hungarian", ("train.epochs=2",))
    assert (wide.assigner, wide.set) == (None, ("train.epochs=2", "model.num_queries=300"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds = [0, 7]", "seeds = [0, 0]", "seeds must be different whole numbers"),
        ("seeds = [0, 7]", "", "seeds must be a list of whole numbers, found None"),
        (
            'baseline = "plain"',
            'baseline = "plan"',
            "baseline 'plan' is not a setting; did you mean",
        ),
        ("assigner =", "asigner =", "unknown key settings.plain.asigner; did you mean assigner"),
        ('assigner = "hungarian"', "assigner = 3", "settings.plain.assigner must be text, found 3"),
        ('set = ["train', 'set = [1, "train', "set must be a list such as"),
        ("[settings.wide]", '[settings."a/b"]', "settings.a/b: the name becomes that of a folder"),
        ("seeds = [0, 7]", "seeds = [", "not TOML"),
    ],
)
def test_a_malformed_study_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in STUDY
    path = written(tmp_path, STUDY.replace(old, new, 1))
    with pytest.raises(StudyError) as error:
        read_study(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_studies_are_found_by_name() -> None:
    assert study_file("table6_shapes").is_file()
    assert study_file("mine/x.toml") == Path("mine/x.toml")
    with pytest.raises(StudyError, match="unknown study table6_shape; did you mean table6_shapes"):
        study_file("table6_shape")


def test_every_setting_has_a_run_for_each_seed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = Arguments("x", output, data=(Path("cells"),), set=(("train.batch_size=1",),))
    jobs = make_jobs(read_study(written(tmp_path)), arguments)
    names = ["plain/seed-0", "wide/seed-0", "plain/seed-7", "wide/seed-7"]
    assert [job.name for job in jobs] == names
    last = jobs[-1]
    assert not is_finished(last)
    words = [sys.executable, "-m", "detrelay.apps.train", "--output", str(output / names[-1])]
    words += ["--recipe", "shapes", "--seed", "7", "--data", "cells"]
    words += ["--set", "train.batch_size=1", "--set", "train.epochs=2", "model.num_queries=300"]
    assert command(last, None) == words
    (output / names[-1] / "checkpoints").mkdir(parents=True)
    launched = command(last, "accelerate launch --num_processes 2")
    assert launched[:4] == ["accelerate", "launch", "--num_processes", "2"]
    assert launched[4:] == [*words[1:], "--resume"]
    (output / names[-1] / "results.json").touch()
    assert is_finished(last)


def test_minutes_of_earlier_starts_are_kept(tmp_path: Path) -> None:
    assert read_minutes(tmp_path) == {}
    (tmp_path / "minutes.json").write_text('{"plain/seed-0": 2.5}')
    assert read_minutes(tmp_path) == {"plain/seed-0": 2.5}
