"""Command lines: their flags, their recipes, and how they refuse."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tyro

from detrelay.apps import check_data, cli, evaluate, predict, publish, replay
from detrelay.apps.console import read_arguments
from detrelay.apps.train import Arguments, check_output, resolve, run_name
from detrelay.core.engine.run_folder import RunFolderError
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import Recipe, override

APPS = Path(__file__).parents[2] / "apps"
COMMANDS = sorted(path.stem for path in APPS.glob("*.py"))
SLOW_TO_IMPORT = {
    *("torch", "torchvision", "transformers", "accelerate", "huggingface_hub"),
    *("datasets", "numpy", "scipy", "matplotlib", "pycocotools", "PIL", "pydantic", "tomlkit"),
}


def parsed(*arguments: str) -> Arguments:
    return tyro.cli(Arguments, args=list(arguments))


def test_flags_of_train_are_frozen() -> None:
    """A new knob belongs into a recipe, where `--set` reaches it."""
    assert [field.name for field in dataclasses.fields(Arguments)] == [
        "recipe", "head", "assigner", "data", "output", "init", "resume", "accept_changes",
        "threads", "find_batch_size", "seed", "dry_run", "set", "push_to", "push_private",
        "debug",
    ]  # fmt: skip


def test_flags_of_the_other_commands_are_frozen() -> None:
    assert [field.name for field in dataclasses.fields(evaluate.Arguments)] == [
        "data", "model", "head", "predictions", "images", "output", "details", "detections",
        "batch_size", "max_detections", "class_agnostic", "backend", "max_pixels", "allow_outside",
        "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(check_data.Arguments)] == [
        "data", "images", "output", "write", "skip_images", "max_pixels", "allow_outside", "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(publish.Arguments)] == [
        "folder", "repo_id", "private", "tag", "license", "head", "dry_run", "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(predict.Arguments)] == [
        "model", "output", "input", "data", "images", "threshold", "head", "max_pixels",
        "allow_outside", "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(replay.Arguments)] == ["file", "debug"]


@pytest.mark.parametrize("app", COMMANDS)
def test_help_answers_at_once(app: str) -> None:
    """Without torch and what stands on it, whose imports take longer than one likes to wait."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}))\n"
        f"sys.argv = ['{app}.py', '--help'];\n"
        f"runpy.run_path({str(APPS / app)!r} + '.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.rstrip().rpartition("\n")
    assert not SLOW_TO_IMPORT & set(modules.split())
    for field in dataclasses.fields(importlib.import_module(f"detrelay.apps.{app}").Arguments):
        option = f"--{field.name.replace('_', '-')} "
        assert option in shown or f" {field.name.upper()} " in shown


def test_every_command_is_known() -> None:
    """To the program and as a script."""
    assert (
        set(COMMANDS)
        == {name.replace("-", "_") for name in cli.COMMANDS}
        == {
            *("train", "evaluate", "report", "study", "compare", "predict", "publish", "convert"),
            *("cost", "replay", "check_data", "export"),
        }
    )


def test_the_program_lists_its_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrelay"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(f"\n  {name.replace('_', '-')} " in shown for name in COMMANDS)


def test_the_program_hands_on_the_arguments_of_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrelay", "evaluate", "--data", "val.json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: name either --model or --predictions\n"


def test_an_unknown_command_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrelay", "trian"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "unknown command trian; did you mean train?" in capsys.readouterr().err


def test_unknown_flag_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--recipi", "shapes")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "Unrecognized options: --recipi" in message
    assert "--recipe" in message


def test_set_takes_several_values_and_may_be_repeated() -> None:
    arguments = parsed("--set", "train.epochs=3", "train.seed=4", "--set", "train.epochs=5")
    recipe = resolve(arguments)
    assert (recipe.train.epochs, recipe.train.seed) == (5, 4)


@pytest.mark.parametrize(
    ("words", "option"), [(["--output", ""], "--output"), (["--seed", "1", "--init="], "--init")]
)
def test_an_empty_argument_is_refused(
    words: list[str], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a path it would be the working directory."""
    monkeypatch.setattr("sys.argv", ["detrelay train", *words])
    with pytest.raises(ValueError, match=f"an empty argument after {option}; give a value"):
        read_arguments(Arguments)


def test_the_default_folder_tells_recipes_and_seeds_apart() -> None:
    recipe = Recipe()
    assert run_name(None, recipe, "cross_stage") == "stageinteractor-cross_stage"
    seeded = override(recipe, ["train.seed=3"])
    assert run_name(None, seeded, "hungarian") == "stageinteractor-hungarian-seed3"
    own = override(recipe, ["head=my_head:MyConfig"])
    assert run_name("recipes/mine.toml", own, "hungarian") == "mine-my_head.MyConfig-hungarian"


def test_nothing_named_means_drawn_shapes() -> None:
    recipe = resolve(parsed("--head", "stageinteractor"))
    assert recipe.data.train_annotations is None
    assert recipe.train.backbone_weights == "none"


def test_data_without_recipe_means_the_published_defaults() -> None:
    recipe = resolve(parsed("--data", "cells"))
    assert (recipe.data.train_annotations, recipe.data.val_annotations) == ("cells", None)
    assert (recipe.model, recipe.train.backbone_weights) == ({}, "imagenet")


def test_a_folder_with_both_json_files_means_these(tmp_path: Path) -> None:
    for name in ("train.json", "val.json"):
        (tmp_path / name).touch()
    data = resolve(parsed("--data", str(tmp_path))).data
    assert (data.train_annotations, data.val_annotations) == (
        str(tmp_path / "train.json"),
        str(tmp_path / "val.json"),
    )


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["train=voc:a", "val=b"], ("voc:a", "b")),
        (["val=b", "train=a"], ("a", "b")),
        (["train=a"], ("a", None)),
        (["hub:user/cells"], ("hub:user/cells", None)),
    ],
)
def test_data_names_places(places: list[str], expected: tuple[str, str | None]) -> None:
    data = resolve(parsed("--data", *places)).data
    assert (data.train_annotations, data.val_annotations) == expected


@pytest.mark.parametrize("places", [["val=b"], ["train=a", "b"], ["a", "b", "c"]])
def test_data_that_is_not_clear_is_refused(places: list[str]) -> None:
    with pytest.raises(RecipeError, match="--data: expected"):
        resolve(parsed("--data", *places))


def test_data_as_a_pair_replaces_the_files_of_the_recipe() -> None:
    recipe = resolve(parsed("--recipe", "stageinteractor_r50_1x", "--data", "a.json", "b.json"))
    assert (recipe.data.train_annotations, recipe.data.val_annotations) == ("a.json", "b.json")
    assert (recipe.data.train_images, recipe.data.val_images) == (None, None)


def test_options_win_over_the_recipe_and_set_over_options(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('[assigner]\nname = "cross_stage"\noptions = {keep_own = true}\n')
    recipe = resolve(parsed("--recipe", str(path), "--assigner", "hungarian", "--seed", "7"))
    assert (recipe.assigner.name, recipe.assigner.options) == ("hungarian", {})
    assert recipe.train.seed == 7
    again = resolve(parsed("--recipe", str(path), "--seed", "7", "--set", "train.seed=8"))
    assert again.train.seed == 8
    assert again.assigner.options == {"keep_own": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "shape"], "unknown recipe shape; did you mean shapes?"),
        (["--data", "a", "b", "c"], "--data: expected a place, or one to train on and one"),
        (["--head", "dino", "--recipe", "shapes"], "has model settings of head stageinteractor"),
        (["--seed", "-1"], "train.seed must be between 0 and"),
        (["--set", "train.epoch=3"], "did you mean train.epochs?"),
    ],
)
def test_bad_options_are_refused(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        resolve(parsed(*arguments))
    assert message in str(error.value)


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


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(
        RunFolderError, match=r"--resume: .* holds no run \(it has no training.json\)"
    ):
        check_output(tmp_path, resolve(Arguments()), Arguments(resume=True))


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"training.json: not the record of a run"):
        resolve(Arguments(output=tmp_path, resume=True))


def test_files_are_scored_without_torch(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 3}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 2, "bbox": [0, 0, 9, 9]}],
        "categories": [{"id": 2, "name": "cell"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(json.dumps([truth["annotations"][0] | {"score": 1}]))
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}))\n"
        "sys.argv = ['evaluate', '--data', 'truth.json', '--predictions', 'found.json']\n"
        "from detrelay.apps.evaluate import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "100.0  maxDets 100" in done.stdout
    assert not {"torch", "transformers", "accelerate"} & set(done.stdout.split())
