"""Recipe files: what they extend, and invalid files."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from detrelay.core.errors import RecipeError
from detrelay.core.recipes.files import parse_value, read_recipe, to_toml
from detrelay.core.recipes.recipe import (
    load_recipe,
)
from factories_data import write_toml


def test_a_recipe_extends_others_key_by_key(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "far.toml").write_text("[train]\nepochs = 1\nbatch_size = 1\nseed = 1\ngamma = 0.5\n")
    (folder / "near.toml").write_text('extends = "far.toml"\n[train]\nepochs = 2\nbatch_size = 2\n')
    (folder / "side.toml").write_text("[train]\nbatch_size = 3\n[model]\nnum_queries = 7\n")
    extends = 'extends = ["base/near.toml", "base/side.toml"]\n'
    recipe = load_recipe(
        write_toml(tmp_path, extends + "[train]\nseed = 4\n[model]\nd_model = 8\n")
    )
    train = recipe.train
    assert (train.epochs, train.batch_size, train.seed, train.gamma) == (2, 3, 4, 0.5)
    assert recipe.model == {"num_queries": 7, "d_model": 8}


@pytest.mark.parametrize(
    ("base", "text", "message"),
    [
        ("", 'extends = "bsae.toml"', r"bsae.toml: cannot read the recipe \(No such .*my.toml ext"),
        ("[train", 'extends = "base.toml"', r"base.toml: not a TOML file .*my.toml extends"),
        ("[train]\nepoch = 1", 'extends = "base.toml"', r"base.toml: unknown key train.epoch; did"),
        (
            'extends = "my.toml"',
            'extends = "base.toml"',
            r"my.toml: extends itself \(.*my.toml -> ",
        ),
        ("", 'extends = "my.toml"', "my.toml: extends itself"),
        ("", "extends = 3", "my.toml: extends must be a file name or a list of them, found 3"),
        ("", '[train]\nextends = "base.toml"', "my.toml: unknown key train.extends"),
    ],
)
def test_a_bad_base_is_refused_by_name(base: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(base)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(write_toml(tmp_path, text))
    assert "\n" not in str(error.value)


def test_diamonds_of_files_are_read_once_each(tmp_path: Path) -> None:
    (tmp_path / "0.toml").write_text("[train]\nepochs = 5\n")
    for level in range(1, 40):
        for name in (f"{level}", f"{level}b"):
            bases = f'extends = ["{level - 1}.toml", "{max(level - 2, 0)}.toml"]\n'
            (tmp_path / f"{name}.toml").write_text(bases)
    assert load_recipe(tmp_path / "39.toml").train.epochs == 5


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match=r"cannot read the recipe \(not a plain file\)"):
            load_recipe(path)
    with pytest.raises(RecipeError, match=r"cannot read the recipe \(Is a directory\)"):
        load_recipe(tmp_path)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: cannot read the recipe \(No such file"):
        load_recipe(tmp_path / "none.toml")


def test_values_are_written_as_toml_without_none() -> None:
    values = {"a": 1, "none": None, "table": {"b": [0.5, "x"], "none": None}}
    assert tomllib.loads(to_toml(values)) == {"a": 1, "table": {"b": [0.5, "x"]}}


def test_plain_words_need_no_quotes() -> None:
    assert parse_value("[1, 2.5]", "x") == [1, 2.5]
    assert parse_value("true", "x") is True
    assert parse_value("resnet50", "x") == parse_value('"resnet50"', "x") == "resnet50"


def test_every_file_is_checked_by_itself(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("a = 1\nb = 1\n")
    path = write_toml(tmp_path, 'extends = "base.toml"\nb = 2\n')
    seen = []
    values = read_recipe(path, lambda own, source: seen.append((dict(own), source)))
    assert values == {"a": 1, "b": 2}
    assert seen == [({"b": 2}, str(path)), ({"a": 1, "b": 1}, str(tmp_path / "base.toml"))]
