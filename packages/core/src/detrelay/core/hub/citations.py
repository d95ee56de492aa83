"""Papers to cite: for a head, its training targets, and the code that its weights come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

_PROGRAMS = {"MCG-NJU/AdaMixer": "gao2022adamixer"}  # whose method differs from the head's
_HEADS = {
    "detrelay_stageinteractor": "teng2023stageinteractor",
    "detrelay_deformable_detr": "zhu2021deformable",
    "detrelay_dn_detr": "li2022dn",
    "detrelay_dino": "zhang2023dino",
}
# model settings that add a pass, and their value without it
_PASSES = {
    "hybrid_queries": (0, "jia2023detrs"),
    "query_groups": (1, "chen2023group"),
    "recollect_queries": (False, "chen2023enhanced"),
    "without_self_attention": (False, "hu2023dac"),
    "one_to_many_branch": (False, "zhao2024ms"),
}
_ASSIGNERS = {
    "cross_stage": "teng2023stageinteractor",
    "repeated": "jia2023detrs",
    "rank_weighted": "cai2023aligndetr",
    "one_to_many": "zhao2024ms",
    "union": "peng2025dfine",
    "iou": "ouyangzhang2022nms",
    "simota": "ge2021ota",
    "restricted": "sun2021rethinking",
}
_COSTS = {
    "softmax": "carion2020end",
    "position_modulated": "liu2023detection",
    "high_order": "pu2023rank",
}
_CLASS_LOSSES = {
    "softmax": "carion2020end",
    "varifocal": "zhao2024detrs",
    "matchability": "huang2025deim",
    "ia_bce": "cai2023aligndetr",
    "position_supervised": "liu2023detection",
    "rank_giou": "pu2023rank",
}


def citations(
    model_type: str,
    assigner: str | None,
    program: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> list[str]:
    """BibTeX entries of the methods used, each once; unknown methods have none.

    Args:
        model_type: of the model's config.
        assigner: the assigner it was trained with, if it was trained here.
        program: the code that wrote the checkpoint that the weights were converted from.
        recipe: the recipe it was trained with, if it was trained here: nested values, as
            `Recipe.to_mapping` gives them; tables may be missing.
    """
    method = _PROGRAMS.get(program or "") or _HEADS.get(model_type)
    keys = [method, _ASSIGNERS.get(assigner or ""), *_of_recipe(recipe or {})]
    return [_papers()[key] for key in dict.fromkeys(keys) if key is not None]


@cache
def _papers() -> dict[str, str]:
    text = files(__package__).joinpath("papers.bib").read_text(encoding="utf-8")
    entries = re.finditer(r"^@\w+\{(\S+),$.*?^\}$", text, re.MULTILINE | re.DOTALL)
    return {entry[1]: entry[0] for entry in entries}


def _of_recipe(recipe: Mapping[str, Any]) -> Iterator[str | None]:
    model = recipe.get("model") or {}
    for setting, (off, key) in _PASSES.items():
        yield key if model.get(setting, off) != off else None
    for table in (recipe, *(recipe.get("groups") or {}).values()):
        yield from _of_assigner(table.get("assigner"))
        yield _CLASS_LOSSES.get(str((table.get("loss") or {}).get("class_loss")))


def _of_assigner(settings: Mapping[str, Any] | None) -> Iterator[str | None]:
    while settings:
        yield _ASSIGNERS.get(str(settings.get("name")))
        for cost in settings.get("costs") or ():
            name = cost.get("name") if isinstance(cost, Mapping) else str(cost).split(":")[0]
            yield _COSTS.get(str(name))
        settings = settings.get("base")
