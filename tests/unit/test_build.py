"""From a recipe to data, model and facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from detrelay.apps.build import (
    build_datasets,
    build_model,
    facts_of_data,
    facts_of_run,
    find_recipe,
    join_parts,
)
from detrelay.apps.training_targets import build_criterion
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.errors import RecipeError
from factories_data import write_coco
from tiny_run import TINY

pytestmark = pytest.mark.usefixtures("small_and_silent")


def test_drawn_images_are_others_for_evaluation_and_the_same_for_any_seed() -> None:
    first, second = (find_recipe("shapes", *TINY, f"train.seed={seed}") for seed in (1, 2))
    train, val = build_datasets(first.data)
    assert isinstance(train, ShapesDataset)
    assert (len(train), len(val)) == (14, 3)
    assert not train[0].image.equal(val[0].image)
    assert build_datasets(second.data)[0][0].image.equal(train[0].image)
    assert facts_of_data(train, val) == {}  # they follow from the recipe


def test_a_model_has_the_classes_of_the_data_and_the_settings_of_the_recipe(
    tmp_path: Path,
) -> None:
    path = write_coco(tmp_path)
    recipe = find_recipe("shapes", *TINY, "train.nms_iou_threshold=0.6", data=(path, path))
    train, val = build_datasets(recipe.data)
    model = build_model(recipe, train.categories)
    assert model.config.class_names == ["wheel", "door"]
    assert model.config.category_ids == [3, 90]
    assert model.config.num_queries == 8
    parts = join_parts(recipe, train, val, model, build_criterion(recipe))
    assert parts.category_ids == [3, 90]
    assert parts.processor.size == {"shortest_edge": 64, "longest_edge": 64}
    assert parts.processor.nms_iou_threshold == 0.6
    assert set(facts_of_data(train, val)) == {"train", "val"}


def test_facts_of_a_run_reproduce_it() -> None:
    recipe = find_recipe("shapes", *TINY, assigner="hungarian")
    facts = facts_of_run(recipe, Path("runs/other"), "detrelay train")
    assert facts["recipe"] == recipe.to_mapping()
    assert (facts["assigner"], facts["init"]) == ("hungarian", "runs/other")
    assert facts["command"] == "detrelay train"
    assert {"commit", "versions", "device"} <= facts.keys()
    published = facts_of_run(find_recipe(head="dino"), None, "")
    assert (published["assigner"], published["init"]) == ("hungarian", None)


def test_an_unknown_evaluator_is_refused(tmp_path: Path) -> None:
    recipe = find_recipe("shapes", *TINY, "train.evaluator=coca")
    train, val = build_datasets(recipe.data)
    model = build_model(recipe, train.categories)
    with pytest.raises(RecipeError, match=r"train\.evaluator: .*did you mean"):
        join_parts(recipe, train, val, model, build_criterion(recipe))
