"""From the weights of one detector to those of a similar one: other classes, queries or layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detrelay.core.detector.model import DetectorForObjectDetection


@dataclass(frozen=True)
class Transfer:
    """What became of the weights of a saved model.

    Attributes:
        kept_classes: names whose scores were copied.
        new_classes: names whose scores are as freshly initialised.
        old_queries: queries of the saved model; None where neither model counts any.
        queries: queries now.
        new: entries that are as freshly initialised, since the saved model has none like them; a
            name stands for all entries under it.
        left_out: entries of the saved model that have no place, likewise.
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

    Scores of classes go by the names of the classes, without regard to case. Of queries the first
    ones are kept; further ones stay as they are in `model`, as does all that `old` lacks.

    Args:
        old: where from.
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
    """Entries with one row more if the option is one more."""
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
    """The shortest names under which all entries are meant."""
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
