"""Assigners by name: the one place where a new one is registered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from detrelay.assigners.costs import build_costs, default_costs
from detrelay.assigners.cross_stage import CrossStageAssigner
from detrelay.assigners.hungarian import HungarianAssigner
from detrelay.assigners.iou import IoUAssigner
from detrelay.assigners.one_to_many import OneToManyAssigner
from detrelay.assigners.rank_weighted import RankWeightedAssigner
from detrelay.assigners.repeated import RepeatedAssigner
from detrelay.assigners.restricted import RestrictedAssigner
from detrelay.assigners.simota import SimOtaAssigner
from detrelay.assigners.union import UnionAssigner
from detrelay.core.criterion import Assigner
from detrelay.core.losses import LossConfig
from detrelay.core.progress import TrainingProgress
from detrelay.core.recipes.recipe import AssignerSettings
from detrelay.core.registry import find_part, make_part

ASSIGNERS: dict[str, type] = {
    "hungarian": HungarianAssigner,
    "cross_stage": CrossStageAssigner,
    "repeated": RepeatedAssigner,
    "rank_weighted": RankWeightedAssigner,
    "one_to_many": OneToManyAssigner,
    "union": UnionAssigner,
    "iou": IoUAssigner,
    "simota": SimOtaAssigner,
    "restricted": RestrictedAssigner,
}


# the base of assigners that were published with one other than Hungarian matching
_BASES = {"rank_weighted": AssignerSettings("repeated", {"times": 2, "max_share": 0.5})}
_HUNGARIAN = AssignerSettings("hungarian")
_GIVEN = ("base", "costs", "progress")


def build_assigner(
    settings: AssignerSettings, loss: LossConfig, progress: TrainingProgress | None = None
) -> Assigner:
    """An assigner as a recipe describes it, with its base and costs.

    A part whose constructor has an argument `base`, `costs` or `progress` gets it: the base (built
    first; Hungarian matching where the settings name none), the matching costs (those of the
    settings, or the published ones with the numbers of the head's loss), the progress of training.

    Args:
        settings: name, options, costs and base.
        loss: the head's loss numbers; the matching costs share box format, alpha and gamma.
        progress: shared with the criterion.

    Raises:
        ValueError: unknown name or option (the message suggests the closest one), or costs or a
            base for an assigner that takes none.
    """
    progress = progress or TrainingProgress()
    name = settings.name or "hungarian"
    part = find_part("assigner", name, ASSIGNERS)
    takes = inspect.signature(part).parameters
    given: dict[str, Any] = {"progress": progress}
    if "base" in takes:
        base = settings.base or _BASES.get(name, _HUNGARIAN)
        if settings.costs and not base.costs and "costs" not in takes:
            base = replace(base, costs=settings.costs)
        given["base"] = build_assigner(base, loss, progress)
    elif settings.base is not None:
        raise ValueError(f"assigner {name!r} takes no base; remove it")
    if "costs" in takes:
        costs = build_costs(settings.costs, loss, progress)
        given["costs"] = costs or default_costs(loss)
    elif settings.costs and "base" not in takes:
        raise ValueError(f"assigner {name!r} takes no costs; remove them")
    assigner: Assigner = make_part("assigner", name, part, settings.options, given, _GIVEN)
    return assigner


def build_assigners(
    name: str, loss: LossConfig, options: Mapping[str, Any] | None = None
) -> dict[str, Assigner]:
    """The table of assigners by stage group that `Criterion` takes.

    The decoder's stages get the named assigner; proposals keep their own one-to-one matching.

    Args:
        name: a key of `ASSIGNERS`, or `module:Class`.
        loss: the head's loss numbers; the matching costs share box format, alpha and gamma.
        options: keyword arguments of the assigner, such as `iou_threshold`.

    Raises:
        ValueError: unknown name or option; the message suggests the closest one.
    """
    decoder = build_assigner(AssignerSettings(name, dict(options or {})), loss)
    return {"decoder": decoder, "proposals": build_assigner(_HUNGARIAN, loss)}
