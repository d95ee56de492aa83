"""Convert released checkpoints to detrelay models, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from detrelay.core.backbones.naming import NAMINGS, find_naming
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.errors import one_line, unknown_name
from detrelay.core.weights.files import StoredWeights, Which, read_weights
from detrelay.heads import HEADS
from detrelay.heads.convert.names import Layout, layout_of
from detrelay.heads.convert.sizes import (
    PROGRAMS,
    VARIANTS,
    guess_head,
    match_variant,
    read_sizes,
)
from detrelay.heads.convert.transformers_folder import PROGRAM as TRANSFORMERS
from detrelay.heads.convert.transformers_folder import read_folder

_BACKBONE = "backbone."
_COUNT = "num_batches_tracked"
_SHOWN = 5
# heads whose released models belong to another head here
_MODELS = {"adamixer": "stageinteractor"}


@dataclass(frozen=True)
class Translation:
    """A checkpoint's entries under our names.

    Attributes:
        state: our entries.
        used: their names and ours in pairs; an entry that is split or joined appears several times.
        dropped: their entries that are left out of `state`, with the reason.
        unknown: their entries that no rule covers.
    """

    state: dict[str, Tensor]
    used: tuple[tuple[str, str], ...]
    dropped: dict[str, str]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        head: one of `VARIANTS`.
        program: GitHub repository of the code that writes such checkpoints.
        variant: the published model, None if no published model has these sizes.
        model: the class that holds it.
        config: of the model.
        state: its parameters and buffers.
        used: names in the checkpoint and ours, in pairs.
        dropped: names in the checkpoint that the model has no use for, with the reason.
        added: our names that the checkpoint lacks and that affect no output, with the reason.
        weights: which of the state dicts in the file; None for tensors not read from a file.
    """

    head: str
    program: str
    variant: str | None
    model: type[DetectorForObjectDetection]
    config: DetectorConfig
    state: dict[str, Tensor]
    used: tuple[tuple[str, str], ...]
    dropped: dict[str, str]
    added: dict[str, str]
    weights: StoredWeights | None = None


def convert_checkpoint(
    path: Path, head: str | None = None, variant: str | None = None, which: Which | None = None
) -> Conversion:
    """Convert a checkpoint of the released code, or a folder of transformers' Deformable DETR.

    Args:
        path: the file or the folder.
        head: see `convert_state_dict`.
        variant: see `convert_state_dict`.
        which: the running average of the weights or the plain ones, see `read_weights`.

    Raises:
        ValueError: the file cannot be read, or see `convert_state_dict`.
    """
    try:
        if not path.is_dir():
            weights = read_weights(path, which)
            return replace(convert_state_dict(weights.state, head, variant), weights=weights)
        folder = read_folder(path)
        conversion = convert_state_dict(
            folder.state, head or "deformable_detr", variant, folder.settings
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(f"{path}") else f"{path}: {text}") from error
    theirs: dict[str, list[str]] = {}
    for name, official in folder.used:
        theirs.setdefault(official, []).append(name)
    used = [(n, ours) for official, ours in conversion.used for n in theirs.get(official, [])]
    dropped = {n: why for key, why in conversion.dropped.items() for n in theirs.get(key, [])}
    return replace(
        conversion,
        program=TRANSFORMERS,
        used=tuple(used),
        dropped={**folder.dropped, **dropped},
    )


def convert_state_dict(
    state: Mapping[str, Tensor],
    head: str | None = None,
    variant: str | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Conversion:
    """Convert the weights of a released model.

    Sizes are read from the shapes, so models that were trained with other numbers of queries,
    layers or classes convert too.

    Args:
        state: under the released program's names.
        head: one of `VARIANTS`; None to infer it from the names.
        variant: the published model that it must be; None to infer it from the shapes.
        settings: config values that the shapes do not tell.

    Raises:
        ValueError: head or variant is unknown or does not fit the weights; or entries are missing,
            unknown or of another shape, all named in one message.
    """
    if head is not None and head not in VARIANTS:
        raise ValueError(unknown_name("head", head, VARIANTS))
    head = head or guess_head(state)
    entry = HEADS[_MODELS.get(head, head)]
    sizes = {**read_sizes(state, head, settings), **settings}
    variant = match_variant(sizes, head, variant)
    try:
        config = entry.config(**sizes)
    except StrictDataclassError as error:
        raise ValueError(f"no model of {head} has these sizes: {one_line(error)}") from error
    translation = translate(state, config)
    with torch.device("meta"):
        expected = entry.model(config).state_dict()
    ours, added = translation.state, {}
    for name, value in expected.items():
        if name not in ours and name.endswith(_COUNT):
            ours[name] = torch.zeros(value.shape, dtype=value.dtype)
            added[name] = "number of batches that a fixed norm has seen"
    _check(translation, expected)
    return Conversion(
        head=head,
        program=PROGRAMS[head],
        variant=variant,
        model=entry.model,
        config=config,
        state=ours,
        used=translation.used,
        dropped=translation.dropped,
        added=added,
    )


def translate(state: Mapping[str, Tensor], config: DetectorConfig) -> Translation:
    """Rename the entries of a released checkpoint to our names, whether or not they are complete.

    Args:
        state: under the released program's names.
        config: of the model.

    Raises:
        ValueError: entries that must be copies of each other, or a known table, differ.
    """
    layout = layout_of(config)
    ours: dict[str, Tensor] = {}
    used: list[tuple[str, str]] = []
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    backbone = {key: v for key, v in state.items() if key.startswith(layout.backbone)}
    if backbone:
        _translate_backbone(backbone, layout, ours, used, dropped)
    rest = [key for key in state if key not in backbone]
    # the first of several names represents the entry
    for key in sorted(rest, key=lambda key: layout.first_name(key) != key):
        reason = next((why for what, why in layout.dead.items() if re.search(what, key)), None)
        name = layout.table.ours(layout.first_name(key))
        if reason is not None:
            dropped[key] = reason
        elif key in layout.constants:
            dropped[key] = _check_constant(key, state[key], layout.constants[key])
        elif name is None:
            unknown.append(key)
        elif name not in ours:
            ours[name] = _without_spare_rows(name, state[key], layout, config)
            used.append((key, name))
        elif ours[name].equal(state[key]):
            dropped[key] = f"another name of {layout.first_name(key)}"
        else:
            raise ValueError(
                f"{key} differs from {layout.first_name(key)}, which must be the same tensor in "
                f"this variant"
            )
    return Translation(ours, tuple(used), dropped, tuple(unknown))


def to_official(state: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """Rename a model's entries to the names of the released code, copies included.

    Entries that affect no output are left out; an unused last row comes back as zeros.

    Args:
        state: all of a model's entries.
        config: of the model.

    Raises:
        ValueError: an entry does not belong to such a model.
    """
    layout = layout_of(config)
    official: dict[str, Tensor] = {}
    backbone = {
        name.removeprefix(_BACKBONE): value
        for name, value in state.items()
        if name.startswith(_BACKBONE) and (layout.counts_batches or not name.endswith(_COUNT))
    }
    for key, value in NAMINGS[layout.naming].to_theirs(backbone).items():
        official[layout.backbone + key] = value
    for name, value in state.items():
        if name.startswith(_BACKBONE):
            continue
        first = layout.table.theirs(name)
        if first is None:
            raise ValueError(f"{name}: not an entry of a {config.model_type} model")
        if name in layout.spare_rows:
            value = torch.cat([value, value.new_zeros(1, *value.shape[1:])])
        official.update(dict.fromkeys(layout.all_names(first), value))
    return {**official, **layout.constants}


def _translate_backbone(
    backbone: Mapping[str, Tensor],
    layout: Layout,
    ours: dict[str, Tensor],
    used: list[tuple[str, str]],
    dropped: dict[str, str],
) -> None:
    """Add the entries of the backbone to the translation."""
    naming, prefix = find_naming(backbone)
    state, sources, left_out = naming.to_ours(
        {key.removeprefix(prefix): value for key, value in backbone.items()}
    )
    ours.update({_BACKBONE + name: value for name, value in state.items()})
    used += [(prefix + sources[name], _BACKBONE + name) for name in state]
    dropped.update({prefix + key: why for key, why in left_out.items()})


def _check_constant(key: str, value: Tensor, constant: Tensor) -> str:
    """Reject a table other than the one our models assume; returns why it is dropped."""
    if not constant.equal(value.to(constant)):
        row = ", ".join(f"{number:g}" for number in constant[0].tolist())
        raise ValueError(
            f"{key} must be {row} in all of its {len(constant)} rows: queries that start "
            f"elsewhere cannot be converted"
        )
    return "table of constants: every query starts as the whole image"


def _without_spare_rows(name: str, value: Tensor, layout: Layout, config: DetectorConfig) -> Tensor:
    return value[: config.num_labels].clone() if name in layout.spare_rows else value


def _check(translation: Translation, expected: Mapping[str, Tensor]) -> None:
    """Reject weights that are not exactly those of the model, all faults in one message."""
    found = translation.state
    missing = [name for name in expected if name not in found]
    reshaped = [
        f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    unknown = [*translation.unknown, *(name for name in found if name not in expected)]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for what, names in (
            ("missing (our names)", missing),
            ("of another shape", reshaped),
            ("unknown", unknown),
        )
        if names
    ]
    if faults:
        raise ValueError(f"the entries are not those of the model: {'; '.join(faults)}")
