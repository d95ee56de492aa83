"""Read folders of transformers' Deformable DETR under the names of the released code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrelay.core.backbones.naming import find_naming
from detrelay.core.weights.files import read_weights
from detrelay.core.weights.key_table import KeyTable

PROGRAM = "huggingface/transformers"  # on GitHub
WEIGHTS = "model.safetensors"
_COCO_IDS = 91
_EDGES = {"shortest_edge", "longest_edge"}
_MODEL_TYPE = "deformable_detr"
_BACKBONE = "model.backbone."
_OFFICIAL_BACKBONE = "backbone.0.body."
_ENCODER, _DECODER = "encoder.layers.{}.", "decoder.layers.{}."
# Old spellings come before the current ones.
_TABLE = KeyTable(
    ("class_embed.", "class_embed."),
    ("bbox_embed.", "bbox_embed."),
    ("model.query_position_embeddings.", "query_embed."),
    ("model.input_proj.", "input_proj."),
    *[
        (f"model.{layer}{theirs}", f"transformer.{layer}{official}")
        for layer, names in (
            (
                _ENCODER,
                (
                    ("self_attn_layer_norm.", "norm1."),
                    ("final_layer_norm.", "norm2."),
                    ("self_attn.", "self_attn."),
                ),
            ),
            (
                _DECODER,
                (
                    ("encoder_attn_layer_norm.", "norm1."),
                    ("self_attn_layer_norm.", "norm2."),
                    ("final_layer_norm.", "norm3."),
                    ("encoder_attn.", "cross_attn."),
                    ("self_attn.out_proj.", "self_attn.out_proj."),
                    ("self_attn.o_proj.", "self_attn.out_proj."),
                    ("self_attn.in_proj_", "self_attn.in_proj_"),
                ),
            ),
        )
        for theirs, official in (
            *names,
            ("fc1.", "linear1."),
            ("fc2.", "linear2."),
            ("mlp.fc1.", "linear1."),
            ("mlp.fc2.", "linear2."),
        )
    ],
    *[
        (f"model.{name}", f"transformer.{name}")
        for name in (
            *("level_embed", "reference_points.", "enc_output.", "enc_output_norm."),
            *("pos_trans.", "pos_trans_norm.", "decoder.class_embed.", "decoder.bbox_embed."),
        )
    ],
)
_QUERY = re.compile(r"(model\.decoder\.layers\.\d+\.self_attn\.)q_proj\.(weight|bias)$")
_KEY_OR_VALUE = re.compile(r"model\.decoder\.layers\.\d+\.self_attn\.[kv]_proj\.(weight|bias)$")
_IN_DECODER = "transformer.decoder."
_TIED = re.compile(r"transformer\.decoder\.(class|bbox)_embed\.")
_CLASS_HEAD = re.compile(r"(class_embed)\.0\.(.+)$")
# settings that no shape tells: theirs, ours
_SETTINGS = (
    ("encoder_attention_heads", "num_attention_heads"),
    ("dropout", "dropout"),
    ("with_box_refine", "box_refinement"),
    ("two_stage", "two_stage"),
)


@dataclass(frozen=True)
class Folder:
    """A folder's model.

    Attributes:
        state: under the names of the released code.
        used: names in the folder and in `state`, in pairs.
        dropped: names in the folder that are not in `state`, with the reason.
        settings: config values that the folder states.
    """

    state: dict[str, Tensor]
    used: tuple[tuple[str, str], ...]
    dropped: dict[str, str]
    settings: dict[str, Any]


def read_folder(folder: Path) -> Folder:
    """Read `config.json` and `model.safetensors`.

    Raises:
        ValueError: a file is missing or unreadable, the model is another one or has a dilated
            backbone, or an entry is unknown.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a model's config: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != _MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise ValueError(f"{path}: expected model_type {_MODEL_TYPE!r}, found {found!r}")
    if config.get("dilation"):
        raise ValueError(f"{path}: a dilated backbone cannot be converted (dilation is true)")
    state, used = to_official_names(read_weights(folder / WEIGHTS, unwrap=False).state)
    # for tied heads a file holds one name only, which may be the decoder's
    short = {key: key.removeprefix(_IN_DECODER) for key in state if _TIED.match(key)}
    short = {key: name for key, name in short.items() if name not in state}
    state = {short.get(key, key): value for key, value in state.items()}
    used = [(name, short.get(key, key)) for name, key in used]
    settings = {ours: config[key] for key, ours in _SETTINGS if key in config}
    if config.get("two_stage"):
        settings["num_queries"] = config.get("two_stage_num_proposals", 300)
    if config.get("with_box_refine"):
        used += _untie_class_heads(state)
    return Folder(state, tuple(used), {}, {**settings, **_labels(config, state)})


def to_official_names(
    theirs: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Rename entries to the names of the released code, with queries, keys and values joined.

    Returns:
        The entries, and the pairs of names.

    Raises:
        ValueError: an entry is unknown.

    """
    state: dict[str, Tensor] = {}
    used: list[tuple[str, str]] = []
    backbone = {key: value for key, value in theirs.items() if key.startswith(_BACKBONE)}
    if backbone:
        naming, prefix = find_naming(backbone)
        parts, sources, _ = naming.to_ours({k.removeprefix(prefix): v for k, v in backbone.items()})
        state.update({_OFFICIAL_BACKBONE + name: value for name, value in parts.items()})
        used += [(prefix + sources[name], _OFFICIAL_BACKBONE + name) for name in parts]
    for key, value in theirs.items():
        if key in backbone or _KEY_OR_VALUE.match(key):
            continue
        names = [key]
        if match := _QUERY.match(key):
            names = [f"{match[1]}{part}_proj.{match[2]}" for part in "qkv"]
            value, key = (
                torch.cat([theirs[name] for name in names]),
                f"{match[1]}in_proj_{match[2]}",
            )
        official = _TABLE.ours(key)
        if official is None:
            raise ValueError(f"{key}: not an entry of transformers' Deformable DETR")
        state[official] = value
        used += [(name, official) for name in names]
    return state, used


def _untie_class_heads(state: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Give each layer the class head that all share; returns the pairs of names."""
    layers = {int(key.split(".")[1]) for key in state if key.startswith("bbox_embed.")}
    first = [match for match in map(_CLASS_HEAD.match, list(state)) if match]
    added = []
    for layer in sorted(layers):
        for match in first:
            name = f"class_embed.{layer}.{match[2]}"
            if name not in state:
                state[name] = state[match[0]].clone()
                added.append((match[0], name))
    return added


def _labels(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The names of the classes, if the folder names them."""
    names = config.get("id2label")
    count = len(state.get("class_embed.0.bias", ()))
    if not isinstance(names, dict) or len(names) != count:
        return {}
    labels = {int(index): name for index, name in names.items()}
    return {
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
        # COCO's classes by their ids
        "category_ids": list(range(count)) if count == _COCO_IDS else None,
    }


def read_image_settings(folder: Path) -> dict[str, Any]:
    """Size and statistics in `preprocessor_config.json`; empty where there is no such file.

    Raises:
        ValueError: the file cannot be read, or its size is not a shortest and a longest edge.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    settings = {key: content[key] for key in ("size", "image_mean", "image_std") if key in content}
    size = settings.get("size")
    if isinstance(size, int) and isinstance(content.get("max_size"), int):  # before version 4.26
        size = settings["size"] = {"shortest_edge": size, "longest_edge": content["max_size"]}
    if size is not None and (not isinstance(size, dict) or set(size) != _EDGES):
        raise ValueError(f"{path}: size must state {' and '.join(sorted(_EDGES))}, found {size}")
    return settings
