"""Recipes of other methods' training targets: their assigners, losses and divisors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from detrelay.apps.training_targets import build_criterion
from detrelay.core.criterion import Criterion
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import Recipe, load_recipe, override

RECIPES = Path(__file__).parents[2] / "apps" / "src" / "detrelay" / "apps" / "recipes"
HUNGARIAN = {"decoder": "Hungarian", "proposals": "Hungarian"}
# assigners by group, from the outermost to the base; class loss and divisor of the decoder
METHODS: dict[str, tuple[dict[str, str], str, str]] = {
    "h_detr_r50_12e": ({**HUNGARIAN, "hybrid": "Repeated"}, "Focal", "larger"),
    "group_detr_r50_12e": (
        {**HUNGARIAN, **{f"group/{index}": "Hungarian" for index in range(1, 11)}},
        *("Focal", "targets*11"),
    ),
    "dac_detr_r50_12e": (
        {**HUNGARIAN, "no_self_attention": "RankWeighted OneToMany"},
        *("IaBce", "targets"),
    ),
    "ms_detr_r50_12e": ({**HUNGARIAN, "one_to_many": "OneToMany"}, "Focal", "targets"),
    "stable_dino_r50_12e": (HUNGARIAN, "PositionSupervised", "targets"),
    "align_detr_r50_12e": (
        {"decoder": "RankWeighted Repeated", "proposals": "RankWeighted Repeated"},
        *("IaBce", "targets"),
    ),
    "rank_detr_r50_12e": ({**HUNGARIAN, "hybrid": "Repeated"}, "RankGiou", "larger"),
    "deta_r50_12e": ({"decoder": "IoU", "proposals": "IoU"}, "Focal", "targets"),
    "dino_r50_4scale_12e_matchability": (HUNGARIAN, "Matchability", "targets"),
    "dino_r50_4scale_12e_union": ({"decoder": "Union Hungarian"}, "Varifocal", "targets"),
    "dino_r50_4scale_12e_cross_stage_union": (
        {"decoder": "CrossStage Union Hungarian", "proposals": "Hungarian"},
        *("Focal", "targets"),
    ),
    "dino_r50_4scale_12e_cross_stage_one_to_many": (
        {"decoder": "CrossStage OneToMany", "proposals": "Hungarian"},
        *("Focal", "targets"),
    ),
    "dino_r50_4scale_12e_cross_stage_matchability": (
        {"decoder": "CrossStage Hungarian", "proposals": "Hungarian"},
        *("Matchability", "larger"),
    ),
}


def chain(assigner: Any) -> str:
    """Names of an assigner and its bases."""
    names = []
    while assigner is not None:
        names.append(type(assigner).__name__.removesuffix("Assigner"))
        assigner = getattr(assigner, "base", None)
    return " ".join(names)


def recipe_of(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml")


def criterion_of(name: str) -> Criterion:
    return build_criterion(recipe_of(name))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_its_settings(name: str) -> None:
    assigners, class_loss, divisor = METHODS[name]
    criterion = criterion_of(name)
    assert {group: chain(part) for group, part in criterion.assigners.items()} == assigners
    term: Any = criterion.terms[0]
    assert type(term).__name__ == f"{class_loss}ClassLoss"
    assert term.divisor == type(term.divisor).parse(divisor)
    lines = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines)
    untried = "A combination that nobody has published" in header
    assert untried is ("12e_cross_stage_" in name)
    assert untried or "Differs from the released program" in header


def weights(criterion: Criterion, group: str) -> list[float]:
    return [term.weight for term in criterion.terms_of(group)]


def test_weights_of_the_published_losses() -> None:
    ms = criterion_of("ms_detr_r50_12e")
    assert [weights(ms, name) for name in ("decoder", "one_to_many", "proposals")] == [
        [1, 5, 2],
        [2, 5, 2],
        [2, 5, 2],
    ]
    stable = criterion_of("stable_dino_r50_12e")
    assert [weights(stable, name) for name in ("decoder", "proposals", "denoising")] == [
        [6, 5, 2],
        [6, 5, 2],
        [1, 5, 2],
    ]
    dac = criterion_of("dac_detr_r50_12e")
    divisors: Any = [term.divisor for term in dac.terms_of("no_self_attention")]  # type: ignore[attr-defined]
    assert {divisor.count: divisor.times for divisor in divisors} == {"targets": 3}
    assert weights(dac, "proposals") == [2, 5, 2]


def test_rank_detr_matches_otherwise_in_the_last_quarter() -> None:
    criterion = criterion_of("rank_detr_r50_12e")
    for group in ("decoder", "hybrid", "proposals"):
        costs = criterion.assigners[group].costs  # type: ignore[attr-defined]
        spans = [(type(cost.cost).__name__, cost.start, cost.end) for cost in costs]
        assert spans[-1] == ("HighOrderCost", 0.75, 1)
        assert [span[1:] for span in spans[:3]] == [(0, 0.75)] * 3
        assert all(cost.progress is criterion.progress for cost in costs)


def test_boxes_that_assigners_judge() -> None:
    deta = criterion_of("deta_r50_12e").assigners
    assert (deta["decoder"].boxes, deta["proposals"].boxes) == ("initial", "references")  # type: ignore[attr-defined]
    dac: Any = criterion_of("dac_detr_r50_12e").assigners["no_self_attention"]
    assert dac.base.boxes == "references"
    assert criterion_of("dino_r50_4scale_12e_union").joins == {"proposals": "decoder"}


def test_a_pass_switched_off_leaves_a_table_without_group() -> None:
    recipe = override(load_recipe(RECIPES / "h_detr_r50_12e.toml"), ["model.hybrid_queries=0"])
    with pytest.raises(RecipeError, match=r"groups.hybrid: head deformable_detr has no such group"):
        build_criterion(recipe)
