"""Recipes: precedence, refusals, and the published figures."""

from __future__ import annotations

import json
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
from factories_data import write_toml


def test_defaults_give_way_to_the_recipe_and_the_recipe_to_overrides(tmp_path: Path) -> None:
    path = write_toml(tmp_path, "[train]\nepochs = 24\nbatch_size = 4\n")
    recipe = load_recipe(path, ["train.batch_size=8", "train.batch_size=9"])
    assert (recipe.train.epochs, recipe.train.batch_size) == (24, 9)
    assert recipe.train.learning_rate == TrainConfig().learning_rate


def test_integers_serve_as_floats_and_become_floats(tmp_path: Path) -> None:
    recipe = load_recipe(write_toml(tmp_path, "[train]\nclip_norm = 1\n"), ["train.gamma=0"])
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
        ('[train]\nlearning_rate = "1e-4"', "train.learning_rate must be a valid number, found st"),
        ("[train]\nepochs = 1.5", "train.epochs must be a valid integer, found float 1.5"),
        ("[train]\nepochs = true", "train.epochs must be a valid integer, found bool True"),
        ("[train]\nlearning_rate = inf", "train.learning_rate must be a finite number, found floa"),
        ("[data]\ncrop = 1", "data.crop must be a valid boolean, found int 1"),
        ('[train]\nno_decay = "norm"', "train.no_decay must be a list, found str"),
        ("[train]\nno_decay = [1]", "train.no_decay must be a valid string, found int 1"),
        ("[data]\ncrop_range = [3]", "data.crop_range must have more values, found list [3]"),
        ('[train]\nmixed_precision = "fp8"', "must be 'no', 'bf16' or 'fp16', found str 'fp8'"),
        ("[train.lr_multipliers]\nhead = 'x'", "train.lr_multipliers.head must be a valid number"),
        ("[train]\nbatch_size = 0", "train.batch_size must be at least 1, found int 0"),
        ("[data]\nflip_probability = 2", "data.flip_probability must be at most 1, found int 2"),
        ("[data]\nshort_sides = [0]", "data.short_sides must be at least 1, found int 0"),
        ("[data]\nshort_sides = []", "data.short_sides must have at least one value"),
        ("[data]\nshort_sides = [1]", "data.short_sides must be at least 8 pixels, found 1"),
        ("[data]\neval_short_side = 1", "data.eval_short_side must be at least 8 pixels, found 1"),
        ("[data]\njitter_size = 7", "data.jitter_size must be at least 8 pixels, found 7"),
        (
            "[train]\npublished_batch_size = 0",
            "published_batch_size must be at least 1, found int 0",
        ),
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
    path = write_toml(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("groups.x.weigth=3", "unknown key groups.x.weigth; did you mean groups.NAME.weight?"),
        ("epochs=3", "--set epochs=3: unknown key epochs; did you mean train.epochs?"),
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("train.epochs.x=3", "unknown key train.epochs.x"),
        ("train.epochs", "--set train.epochs: expected key=value"),
        ("train.epochs=many", "train.epochs must be a valid integer, found str 'many'"),
        ("data.val_annotations=a.json", "--set: data.val_annotations needs data.train_annotat"),
        ("model=3", "model must be a table, found int 3"),
    ],
)
def test_a_bad_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        override(Recipe(), [assignment])
    assert message in str(error.value)


DEEP = 10**5


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
