"""Transfer weights between similar detectors with other classes, queries or layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detrelay.core.detector.model import DetectorForObjectDetection


@dataclass(frozen=True)
class Transfer:
    """What was transferred from a saved model.

    Attributes:
        kept_classes: classes whose scores were copied.
        new_classes: classes whose scores are freshly initialised.
        old_queries: queries of the saved model; None if neither model has a number of queries.
        queries: queries now.
        new: freshly initialised entries, with no counterpart in the saved model; a name covers all
            entries under it.
        left_out: entries of the saved model that do not fit, likewise.
    """

    kept_classes: list[str]
    new_classes: list[str]
    old_queries: int | None
    queries: int | None
    new: list[str]
    left_out: list[str]


@torch.no_grad()
def transfer_weights(
    old: DetectorForObjectDetection, model: DetectorForObjectDetection
) -> Transfer:
    """Copy what fits from one model into another of the same kind.

    Class scores are matched by class name, ignoring case. The first queries are copied; further
    ones stay as they are in `model`, as does everything that `old` lacks.

    Args:
        old: the model to copy from.
        model: freshly initialised; filled in place.
    """
    source = old.state_dict()
    by_class, by_query = _that_follow(old, "num_labels"), _that_follow(old, "num_queries")
    known = {name.casefold(): row for row, name in reversed([*enumerate(old.config.class_names)])}
    names = model.config.class_names
    kept = [row for row, name in enumerate(names) if name.casefold() in known]
    kept_from = [known[names[row].casefold()] for row in kept]
    new = []
    target = model.state_dict()
    for key, value in target.items():
        given = source.get(key)
        if given is None or given.shape[1:] != value.shape[1:]:
            new.append(key)
        elif key in by_query or (key in by_class and key.startswith(model.object_scores)):
            count = min(len(given), len(value))
            value[:count] = given[:count]
        elif key in by_class:
            value[kept] = given[kept_from].to(value)
        elif given.shape == value.shape:
            value.copy_(given)
        else:
            new.append(key)
    lost = [key for key in source if key not in target]
    return Transfer(
        kept_classes=[names[row] for row in kept],
        new_classes=[name for row, name in enumerate(names) if row not in set(kept)],
        old_queries=getattr(old.config, "num_queries", None),
        queries=getattr(model.config, "num_queries", None),
        new=_summed_up(new, target),
        left_out=_summed_up(lost, source),
    )


def _that_follow(model: DetectorForObjectDetection, option: str) -> set[str]:
    """Entries that gain a row when the option grows by one."""
    count = getattr(model.config, option, None)
    if count is None:
        return set()
    config = copy.deepcopy(model.config)
    setattr(config, option, count + 1)
    with torch.device("meta"):
        larger = type(model)(config).state_dict()
    return {
        key
        for key, value in model.state_dict().items()
        if value.dim() and larger[key].shape == (len(value) + 1, *value.shape[1:])
    }


def _summed_up(keys: Iterable[str], among: Mapping[str, Tensor]) -> list[str]:
    """The shortest names that cover exactly these entries."""
    meant = set(keys)
    found: list[str] = []
    for key in meant:
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            under = {other for other in among if other == name or other.startswith(f"{name}.")}
            if under <= meant:
                found.append(name)
                break
    return sorted(set(found))
