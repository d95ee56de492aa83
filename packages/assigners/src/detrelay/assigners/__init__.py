"""Assigners by name: the one place where a new one is entered."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from detrelay.assigners.costs import default_costs
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
from detrelay.core.errors import nearest
from detrelay.core.losses import LossConfig

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


def build_assigners(
    name: str, loss: LossConfig, options: Mapping[str, Any] | None = None
) -> dict[str, Assigner]:
    """The table of assigners by stage group that `Criterion` takes.

    The decoder's stages get the named assigner; proposals keep their own one-to-one matching,
    since their query index is not that of the decoder.

    Args:
        name: a key of `ASSIGNERS`.
        loss: the head's loss numbers; the matching costs share box format, alpha and gamma.
        options: keyword arguments of the assigner, such as `iou_threshold`.

    Raises:
        ValueError: unknown name or option; the message suggests the nearest one.
    """
    if name not in ASSIGNERS:
        raise ValueError(f"unknown assigner {name!r}; {nearest(name, ASSIGNERS, repr)}")
    options = dict(options or {})
    hungarian = HungarianAssigner(default_costs(loss))
    parameters = inspect.signature(ASSIGNERS[name]).parameters
    allowed = [key for key in parameters if key not in ("base", "costs")]
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"assigner {name!r} has no option {key!r}; {nearest(key, allowed, repr)}"
            )
    if "base" in parameters:
        decoder: Assigner = ASSIGNERS[name](base=hungarian, **options)
    elif "costs" in parameters:
        decoder = ASSIGNERS[name](costs=hungarian.costs, **options)
    else:
        decoder = ASSIGNERS[name](**options)
    return {"decoder": decoder, "proposals": hungarian}
