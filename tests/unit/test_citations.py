"""Papers to cite."""

from __future__ import annotations

from typing import Any

from detrelay.assigners import ASSIGNERS
from detrelay.assigners.costs import COSTS
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.hub.citations import citations
from detrelay.heads import HEADS


def test_every_head_has_a_paper() -> None:
    for entry in HEADS.values():
        assert citations(entry.config.model_type, None)
    assert len(citations("detrelay_dino", "cross_stage")) == 2
    assert len(citations("detrelay_stageinteractor", "cross_stage")) == 1
    assert citations("somebody_elses", "hungarian") == []
    (adamixer,) = citations("detrelay_stageinteractor", None, "MCG-NJU/AdaMixer")
    assert "AdaMixer" in adamixer
    (deformable,) = citations("detrelay_deformable_detr", None, "fundamentalvision/Deformable-DETR")
    assert "Deformable DETR" in deformable


TARGETS = {
    "model": {"hybrid_queries": 300, "query_groups": 1},
    "assigner": {
        "name": "cross_stage",
        "base": {"name": "union", "costs": ["l1:5", {"name": "high_order"}]},
    },
    "loss": {"class_loss": "matchability"},
    "groups": {"hybrid": {"assigner": {"name": "repeated"}, "loss": {"class_loss": "softmax"}}},
}


def test_training_targets_have_papers() -> None:
    entries = citations("detrelay_dino", "cross_stage", recipe=TARGETS)
    keys = [entry.partition("{")[2].partition(",")[0] for entry in entries]
    assert keys[2:] == [
        *("jia2023detrs", "peng2025dfine", "pu2023rank", "huang2025deim"),
        "carion2020end",
    ]
    assert all(entry.count("{") == entry.count("}") for entry in entries)
    assert citations("detrelay_dino", "hungarian", recipe={"assigner": {"name": "hungarian"}}) == (
        citations("detrelay_dino", None)
    )


def test_every_assigner_loss_cost_and_pass_of_a_paper_is_cited() -> None:
    plain = {"hungarian", "cross_stage", "focal", "l1", "giou"}
    recipes: list[dict[str, Any]] = [
        *({"assigner": {"name": name}} for name in ASSIGNERS if name not in plain),
        *({"assigner": {"costs": [f"{name}:2"]}} for name in COSTS if name not in plain),
        *({"loss": {"class_loss": name}} for name in CLASS_LOSSES if name not in plain),
    ]
    for recipe in recipes:
        assert len(citations("somebody_elses", None, recipe=recipe)) == 1, recipe
    plain_recipe = {"assigner": {"name": "hungarian", "costs": ["focal:2", "l1"]}}
    assert citations("somebody_elses", None, recipe=plain_recipe) == []
