"""Weight files of other programs, read without running anything that is stored in them."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from detrelay.core.errors import one_line

Which = Literal["average", "plain"]
# where the weights stand in checkpoints that hold more
_PLAIN = ("state_dict", "model", "model_state_dict")
# where programs keep a running average of them, with which they evaluate
_AVERAGES = ("ema", "ema_model", "model_ema", "state_dict_ema")
_INSIDE = (("module",), ("state_dict",))
# of wrappers: several devices, torch.compile, Lightning
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_COUNTS = ("n_averaged", "steps")  # in the AveragedModel of torch and of mmengine
# mmengine's hook exchanges the two when it saves: the average stands under "state_dict"
_EXCHANGED = "ema_state_dict"


@dataclass(frozen=True)
class StoredWeights:
    """A state dict in a file.

    Attributes:
        state: the tensors by name; what wrappers put before all names is cut off.
        place: where it stands in the file, such as "ema.module"; empty where there is nothing else.
        which: whether it is a running average; "plain" where the file holds one state dict.
        other: where the other kind stands; None if there is none.
    """

    state: dict[str, Tensor]
    place: str
    which: Which
    other: str | None


def read_weights(path: Path, which: Which | None = None, *, unwrap: bool = True) -> StoredWeights:
    """The state dict in a `.safetensors` file or a pickled checkpoint.

    Checkpoints that hold more, as those of mmdetection (`state_dict`) and DETR (`model`), are
    opened.

    Args:
        path: the file.
        which: "average" for a running average of the weights, "plain" for the weights themselves;
            the average if None and there is one, since programs that keep one evaluate with it.
        unwrap: cut off what wrappers put before all names.

    Raises:
        ValueError: the file is missing, unreadable, or holds no such state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as weights: {one_line(error)}") from error
    found = _find(content)
    if not found:
        raise ValueError(
            f"{path}: expected a state dict of tensors, alone or under one of "
            f"{', '.join((*_PLAIN, *_AVERAGES))}"
        )
    taken = which or ("average" if "average" in found else "plain")
    if taken not in found:
        asked = "average of the weights" if taken == "average" else "plain weights"
        raise ValueError(f"{path}: holds no {asked}")
    place, state = found[taken]
    other = found.get("plain" if taken == "average" else "average")
    state = {key: value for key, value in state.items() if key not in _COUNTS}
    while unwrap and state and (wrapper := _wrapper(state)):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return StoredWeights(state, place, taken, other and other[0])


def _find(content: Any) -> dict[Which, tuple[str, dict[str, Tensor]]]:
    """Places and state dicts of the two kinds, as far as there are such."""
    if (alone := _state_at(content, ())) is not None:
        return {"plain": ("", alone)}
    kinds: dict[Which, tuple[str, ...]] = {"average": _AVERAGES, "plain": _PLAIN}
    if _state_at(content, (_EXCHANGED,)) is not None:
        kinds = {"average": _PLAIN, "plain": (_EXCHANGED,)}
    found: dict[Which, tuple[str, dict[str, Tensor]]] = {}
    for kind, names in kinds.items():
        places = [(name, *inside) for name in names for inside in ((), *_INSIDE)]
        states = [(".".join(place), _state_at(content, place)) for place in places]
        for place, state in states:
            if state is not None:
                found.setdefault(kind, (place, state))
    return found


def _state_at(content: Any, place: Sequence[str]) -> dict[str, Tensor] | None:
    """The state dict at nested keys; None if there is none."""
    for name in place:
        content = content.get(name) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not content:
        return None
    plain = all(isinstance(key, str) and torch.is_tensor(v) for key, v in content.items())
    return content if plain else None


def _wrapper(state: Mapping[str, Tensor]) -> str | None:
    """What a wrapper has put before all names."""
    return next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None)


def _unpickle(path: Path) -> Any:
    # the settings of a run that DETR and its children store are plain values in a Namespace
    with torch.serialization.safe_globals([argparse.Namespace]):
        # mapped, so that an optimiser's state beside the weights is never read
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
