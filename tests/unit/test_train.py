"""The command that trains: its flags, and the recipe that they resolve to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from commands import parsed
from detrelay.apps.train import Arguments, resolve, run_name
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import Recipe, override


def test_flags_of_train_are_frozen() -> None:
    """A new knob belongs into a recipe, where `--set` reaches it."""
    assert [field.name for field in dataclasses.fields(Arguments)] == [
        "recipe", "head", "assigner", "data", "output", "init", "resume", "accept_changes",
        "threads", "find_batch_size", "seed", "dry_run", "set", "push_to", "push_private",
        "debug",
    ]  # fmt: skip


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
        (["--seed", "-1"], "train.seed must be at least 0"),
        (["--set", "train.epoch=3"], "did you mean train.epochs?"),
    ],
)
def test_bad_options_are_refused(arguments: Sequence[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        resolve(parsed(*arguments))
    assert message in str(error.value)
