"""Recipes: precedence, refusals, and the published figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import (
    Recipe,
    TrainConfig,
    differences,
    load_recipe,
    override,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text)
    return path


def test_defaults_give_way_to_the_recipe_and_the_recipe_to_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\nepochs = 24\nbatch_size = 4\n")
    recipe = load_recipe(path, ["train.batch_size=8", "train.batch_size=9"])
    assert (recipe.train.epochs, recipe.train.batch_size) == (24, 9)
    assert recipe.train.learning_rate == TrainConfig().learning_rate


def test_integers_serve_as_floats_and_become_floats(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "[train]\nclip_norm = 1\n"), ["train.gamma=0"])
    assert (recipe.train.clip_norm, recipe.train.gamma) == (1.0, 0.0)
    assert isinstance(recipe.train.clip_norm, float)


def test_overrides_reach_free_tables_and_plain_words(tmp_path: Path) -> None:
    recipe = load_recipe(
        None,
        [
            "model.num_queries=300",
            "assigner.name=hungarian",
            "assigner.options.iou_threshold=[0.3, 0.5]",
            "train.lr_multipliers.backbone.layer2=0.1",
            "train.mixed_precision=bf16",
        ],
    )
    assert recipe.model == {"num_queries": 300}
    assert recipe.assigner.name == "hungarian"
    assert recipe.assigner.options == {"iou_threshold": [0.3, 0.5]}
    assert recipe.train.lr_multipliers == {"backbone.layer2": 0.1}
    assert recipe.train.mixed_precision == "bf16"


def test_files_that_belong_together_may_be_named_one_after_the_other() -> None:
    recipe = load_recipe(None, ["data.train_annotations=a.json", "data.val_annotations=b.json"])
    assert recipe.data.val_annotations == "b.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlearing_rate = 1", "unknown key train.learing_rate; did you mean train.learni"),
        ("[trian]\nepochs = 1", "unknown key trian; did you mean train?"),
        ("train = 3", "train must be a table, found int 3"),
        ('[train]\nlearning_rate = "1e-4"', "train.learning_rate must be of type number, found st"),
        ("[train]\nepochs = 1.5", "train.epochs must be of type integer, found float 1.5"),
        ("[train]\nepochs = true", "train.epochs must be of type integer, found bool True"),
        ("[train]\nlearning_rate = inf", "train.learning_rate must be of type number, found floa"),
        ("[data]\ncrop = 1", "data.crop must be of type boolean, found int 1"),
        ('[train]\nno_decay = "norm"', "train.no_decay must be a list of strings, found str"),
        ("[train]\nno_decay = [1]", "train.no_decay must be of type string, found int 1"),
        ("[data]\ncrop_range = [3]", "data.crop_range must have 2 values, found list [3]"),
        ('[train]\nmixed_precision = "fp8"', "must be 'no' or 'bf16' or 'fp16', found str 'fp8'"),
        ("[train.lr_multipliers]\nhead = 'x'", "train.lr_multipliers.head must be of type number"),
        ("[train]\nbatch_size = 0", "train.batch_size must be at least 1, found 0"),
        ("[data]\nflip_probability = 2", "data.flip_probability must be between 0 and 1, found 2"),
        ("[data]\nshort_sides = [0]", "data.short_sides must be at least 1, found 0"),
        ("[data]\nshort_sides = []", "data.short_sides must have at least one value"),
        ("[data]\nshort_sides = [1]", "data.short_sides must be at least 8 pixels, found 1"),
        ("[data]\neval_short_side = 1", "data.eval_short_side must be at least 8 pixels, found 1"),
        ("[data]\njitter_size = 7", "data.jitter_size must be at least 8 pixels, found 7"),
        ("[train]\npublished_batch_size = 0", "published_batch_size must be at least 1, found 0"),
        ('[train]\nschedule = "linear"', "must be 'multi_step' or 'cosine', found str 'linear'"),
        ("[data]\nmax_size = 700", "data.max_size (700) must be at least the largest of"),
        ("[train]\nmilestones = [8, 8]", "train.milestones must increase, found [8, 8]"),
        ("[data]\ncrop_range = [600, 384]", "data.crop_range must be [minimum, maximum]"),
        ("[data]\njitter_range = [1, 0.5]", "data.jitter_range must be [minimum, maximum]"),
        ("[data]\ncrop = true\njitter_size = 9", "data.crop and data.jitter_size exclude each"),
        (
            '[data]\non_bad_image = "go"',
            "data.on_bad_image must be 'stop' or 'skip', found str 'go'",
        ),
        ('[data]\nval_annotations = "a"', "val_annotations needs data.train_annotations"),
        ("[train\nepochs = 1", "not a TOML file"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(
    text: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_extends_others_key_by_key(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "far.toml").write_text("[train]\nepochs = 1\nbatch_size = 1\nseed = 1\ngamma = 0.5\n")
    (folder / "near.toml").write_text('extends = "far.toml"\n[train]\nepochs = 2\nbatch_size = 2\n')
    (folder / "side.toml").write_text("[train]\nbatch_size = 3\n[model]\nnum_queries = 7\n")
    extends = 'extends = ["base/near.toml", "base/side.toml"]\n'
    recipe = load_recipe(write(tmp_path, extends + "[train]\nseed = 4\n[model]\nd_model = 8\n"))
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
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs=3", "--set epochs=3: unknown key epochs; did you mean train.epochs?"),
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("train.epochs.x=3", "unknown key train.epochs.x"),
        ("train.epochs", "--set train.epochs: expected key=value"),
        ("train.epochs=many", "train.epochs must be of type integer, found str 'many'"),
        ("data.val_annotations=a.json", "--set: data.val_annotations needs data.train_annotat"),
        ("model=3", "model must be of type table, found int 3"),
    ],
)
def test_a_bad_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        override(Recipe(), [assignment])
    assert message in str(error.value)


DEEP = 10**5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\na = " + "[" * DEEP + "]" * DEEP,
            "larger than 65536 bytes, the limit of a recipe",
        ),
        ("[model]\na = " + "[" * 5000 + "]" * 5000, "not a TOML file (maximum recursion depth"),
        ("[model" + ".a" * 5000 + "]", "model.a.a is nested more than 20 deep"),
        ("[model]\na = 2026-01-01", "model.a must be a string, a number, a boolean, a list or a"),
        ("[train]\nepochs = 2026-01-01", "train.epochs must be a string, a number, a boolean, a"),
        (
            "[train]\nlearning_rate = 1" + "0" * 400,
            "train.learning_rate must be an integer of at most 64",
        ),
        ("[train]\nepochs = 1" + "0" * 400, "train.epochs must be an integer of at most 64 bits"),
        ("[train]\nepochs = 1" + "0" * 5000, "not a TOML file (Exceeds the limit"),
        (
            "[train]\nlearning_rate = 1e400",
            "train.learning_rate must be of type number, found floa",
        ),
        ("[model]\na = nan", "model.a must be of type number, found float nan"),
        (
            "[assigner]\noptions = {a = [-inf]}",
            "assigner.options.a must be of type number, found flo",
        ),
        ("[train]\nema_decay = 1.0", "train.ema_decay must be at least 0 and below 1, found 1.0"),
        ("[train.lr_multipliers]\nhead = -1", "train.lr_multipliers.head must be at least 0"),
        ("head = '" + "x" * 5000 + "'\ntrain = 3", "train must be a table, found int 3"),
        ("[train]\nepochs = '" + "x" * 5000 + "'", "train.epochs must be of type integer, found"),
    ],
)
def test_hostile_values_are_refused_in_one_short_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    said = str(error.value).removeprefix(f"{path}: ")
    assert said.startswith(message)
    assert "\n" not in said
    assert len(said) < 200


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


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "train.epochs=3\ntrain.seed=4",
            "--set 'train.epochs=3\\ntrain.seed=4': expected key=value",
        ),
        ("model.a=" + "[" * DEEP, "not a TOML value (maximum recursion depth exceeded"),
        ("train.epochs=1" + "0" * 5000, "not a TOML value (Exceeds the limit"),
        (
            "model.a=1979-05-27",
            "model.a must be a string, a number, a boolean, a list or a table, f",
        ),
    ],
)
def test_hostile_overrides_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        override(Recipe(), [assignment])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: cannot read the recipe \(No such file"):
        load_recipe(tmp_path / "none.toml")


def test_the_resolved_recipe_reads_back_equal() -> None:
    recipe = load_recipe(
        None,
        [
            'model.backbone_name="resnet18"',
            "model.dotted.name=true",
            "train.lr_multipliers.backbone.layer1=0.1",
            'train.no_decay=["norm", "a\\"b"]',
            "train.learning_rate=1e-7",
        ],
    )
    assert Recipe.from_mapping(tomllib.loads(recipe.to_toml()), "toml") == recipe
    assert Recipe.from_mapping(json.loads(json.dumps(recipe.to_mapping())), "json") == recipe


def test_differences_name_dotted_keys() -> None:
    first = load_recipe(None, ["model.num_queries=300"])
    second = load_recipe(None, ["train.epochs=13", "assigner.options.keep_own=true"])
    assert differences(first, second) == {
        "model.num_queries": (300, None),
        "train.epochs": (12, 13),
        "assigner.options.keep_own": (None, True),
    }


def test_recipes_can_be_read_without_torch() -> None:
    code = "import sys, detrelay.core.recipes.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
