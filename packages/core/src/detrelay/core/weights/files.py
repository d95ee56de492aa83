"""Read weight files of other programs without running any code stored in them."""

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
# keys of the weights in checkpoints that contain more
_PLAIN = ("state_dict", "model", "model_state_dict")
# keys of the running average, with which programs evaluate
_AVERAGES = ("ema", "ema_model", "model_ema", "state_dict_ema")
_INSIDE = (("module",), ("state_dict",))
# prefixes of wrappers: several devices, torch.compile, Lightning
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_COUNTS = ("n_averaged", "steps")  # of the AveragedModel in torch and in mmengine
# mmengine's hook swaps the two when it saves: the average is under "state_dict"
_EXCHANGED = "ema_state_dict"


@dataclass(frozen=True)
class StoredWeights:
    """A state dict in a file.

    Attributes:
        state: the tensors by name, without the prefixes of wrappers.
        place: its key in the file, such as "ema.module"; empty if the file contains nothing else.
        which: whether it is a running average; "plain" if the file has a single state dict.
        other: key of the other kind; None if there is none.
    """

    state: dict[str, Tensor]
    place: str
    which: Which
    other: str | None


def read_weights(path: Path, which: Which | None = None, *, unwrap: bool = True) -> StoredWeights:
    """The state dict in a `.safetensors` file or a pickled checkpoint.

    In checkpoints that contain more, as those of mmdetection (`state_dict`) and DETR (`model`), it
    is found by its key.

    Args:
        path: the file.
        which: "average" for a running average of the weights, "plain" for the weights themselves;
            if None, the average if there is one, since programs that keep one evaluate with it.
        unwrap: remove the prefixes of wrappers.

    Raises:
        ValueError: the file is missing, unreadable, or has no such state dict.
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
    """Keys and state dicts of the two kinds, if present."""
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
    """The prefix that a wrapper added to all names."""
    return next((w for w in _WRAPPERS if all(key.startswith(w) for key in state)), None)


def _unpickle(path: Path) -> Any:
    # DETR and its descendants store a run's settings as plain values in a Namespace
    with torch.serialization.safe_globals([argparse.Namespace]):
        # memory-mapped, so that an optimiser's state next to the weights is never read
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
