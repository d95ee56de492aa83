"""What a folder must contain to be resumed from, and what may differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from commands import parsed
from detrelay.apps.train import Arguments, check_output, resolve
from detrelay.core.engine.run_folder import RunFolderError
from detrelay.core.errors import RecipeError


def begin_run(output: Path, arguments: Arguments) -> None:
    output.mkdir()
    record = {"recipe": resolve(arguments).to_mapping(), "init": None}
    (output / "training.json").write_text(json.dumps(record))


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = Arguments(output=output)
    check_output(output, resolve(arguments), arguments)
    begin_run(output, arguments)
    with pytest.raises(
        RunFolderError, match=r"holds another run \(training.json\); continue it with --res"
    ):
        check_output(output, resolve(arguments), arguments)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "best", "last"])
def test_remains_of_a_run_count_as_a_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(RunFolderError, match="holds another run"):
        check_output(tmp_path, resolve(Arguments()), Arguments())


def test_other_files_in_the_folder_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    check_output(tmp_path, resolve(Arguments()), Arguments())


def test_resume_takes_the_stored_recipe_and_lets_epochs_grow(tmp_path: Path) -> None:
    output = tmp_path / "run"
    begin_run(output, Arguments(set=(("train.learning_rate=0.25",),)))
    arguments = parsed("--resume", "--output", str(output), "--set", "train.epochs=99")
    recipe = resolve(arguments)
    assert (recipe.train.learning_rate, recipe.train.epochs) == (0.25, 99)
    check_output(output, recipe, arguments)


def test_resume_under_a_cosine_may_not_grow(tmp_path: Path) -> None:
    output = tmp_path / "run"
    begin_run(output, Arguments(set=(("train.schedule=cosine",),)))
    arguments = parsed("--resume", "--output", str(output), "--set", "train.epochs=99")
    with pytest.raises(RecipeError, match=r"train.epochs .* under a cosine nothing may change"):
        check_output(output, resolve(arguments), arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.epochs=1"], r"train.epochs \(\d+ -> 1\)"),
        (["--seed", "5", "--set", "model.num_queries=7"], r"num_queries \(\d+ -> 7\), train.seed"),
        (["--recipe", "bccd_small"], r"data.train_annotations \(None -> 'data/bccd/train.json'\)"),
        (["--init", "somewhere"], "omit --init"),
    ],
)
def test_resume_with_a_changed_recipe_names_the_keys(
    options: Sequence[str], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    begin_run(output, Arguments())
    arguments = parsed("--resume", "--output", str(output), *options)
    with pytest.raises(RecipeError, match=message):
        check_output(output, resolve(arguments), arguments)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (("data.batch_by_shape=true",), "train.batch_size=4"),
        (("data.stream=true", "data.train_annotations=hub:me/set"), "data.num_workers=7"),
        (("data.stream=true", "data.train_annotations=hub:me/set"), "train.accumulation_steps=2"),
    ],
)
def test_what_decides_the_order_of_images_must_stay(
    settings: tuple[str, ...], change: str, tmp_path: Path
) -> None:
    begin_run(tmp_path / "run", Arguments(set=(settings,)))
    begin_run(tmp_path / "free", Arguments())
    for name in ("run", "free"):
        arguments = parsed("--resume", "--output", str(tmp_path / name), "--set", change)
        recipe = resolve(arguments)
        if name == "free":
            check_output(tmp_path / name, recipe, arguments)
            break
        with pytest.raises(RecipeError, match=rf"{change.partition('=')[0]} .*; leave it as it"):
            check_output(tmp_path / name, recipe, arguments)


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"--resume: .* holds no run \(it has no training.json\)"
    ):
        check_output(tmp_path, resolve(Arguments()), Arguments(resume=True))


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"training.json: not the record of a run"):
        resolve(Arguments(output=tmp_path, resume=True))
