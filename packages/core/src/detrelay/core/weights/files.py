"""Weight files of other programs, read without running anything that is stored in them."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from detrelay.core.errors import one_line

# where the weights stand in checkpoints that hold more
_NESTED = ("state_dict", "model", "model_state_dict")
# of wrappers for several devices
_WRAPPER = "module."


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` file or a pickled checkpoint.

    Checkpoints that hold more, as those of mmdetection (`state_dict`) and DETR (`model`), are
    opened; "module." before all names is cut off.

    Raises:
        ValueError: the file is missing, unreadable, or holds no state dict.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as weights: {one_line(error)}") from error
    if isinstance(content, dict):
        nested = next((name for name in _NESTED if isinstance(content.get(name), dict)), None)
        content = content if nested is None else content[nested]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(key, str) and torch.is_tensor(v) for key, v in content.items())
    ):
        raise ValueError(
            f"{path}: expected a state dict of tensors, alone or under one of {', '.join(_NESTED)}"
        )
    if all(key.startswith(_WRAPPER) for key in content):
        content = {key.removeprefix(_WRAPPER): value for key, value in content.items()}
    return dict(content)


def _unpickle(path: Path) -> Any:
    # the settings of a run that DETR and its children store are plain values in a Namespace
    with torch.serialization.safe_globals([argparse.Namespace]):
        # mapped, so that an optimiser's state beside the weights is never read
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
