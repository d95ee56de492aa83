"""Entries of released checkpoints: names and shapes, from the lists that were made of them."""

from __future__ import annotations

import argparse
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrelay.heads import HEADS
from detrelay.heads.convert.conversion import to_official
from factories import small_head_config

FOLDER = Path(__file__).parent / "assets"
# head, its variant, the list it is in, and the list with the remaining names
LISTED = (
    ("stageinteractor", "r50_1x", "r50_1x", None),
    ("stageinteractor", "r101_3x", "r101_3x", "r50_1x"),
    ("stageinteractor", "dx101_300", "dx101", "r50_1x"),
    ("stageinteractor", "swin_s_300", "swin_s", "r50_1x"),
    ("deformable_detr", "base", "base", None),
    ("deformable_detr", "refine", "refine", None),
    ("deformable_detr", "two_stage", "two_stage", None),
    ("dino", "r50_4scale", "r50_4scale", None),
    ("dino", "r50_5scale", "r50_5scale", "r50_4scale"),
    ("dino", "swin_l_4scale", "swin_l_4scale", "r50_4scale"),
)

_PREDICTOR = re.compile(r"(class|bbox)_embed\.(\d+)\.(.+)$")


@cache
def manifest(head: str) -> Any:
    return json.loads((FOLDER / head / "manifest.json").read_text())


def listed_shapes(head: str, name: str, base: str | None) -> dict[str, list[int]]:
    """Shapes by name, each entry once."""
    own = manifest(head)[name]["keys"]
    rest = manifest(head)[base]["keys"] if base else {}
    if "swin" in name:
        rest = {key: shape for key, shape in rest.items() if not key.startswith("backbone.")}
    return {**rest, **own}


def all_shapes(head: str, name: str, base: str | None) -> dict[str, list[int]]:
    """Shapes by name, as a file has them."""
    return with_second_names(listed_shapes(head, name, base), head, name, layers=6)


def with_second_names(entries: dict[str, Any], head: str, name: str, layers: int) -> dict[str, Any]:
    """The same entries, including those with several names in a file."""
    result = dict(entries)
    shared = head == "dino" or name == "base"
    for key, value in entries.items():
        if (match := _PREDICTOR.match(key)) is None:
            continue
        kind, index, rest = match.groups()
        in_decoder = head == "dino" or name == "two_stage" or (name, kind) == ("refine", "bbox")
        for number in range(layers) if shared else [index]:
            result[f"{kind}_embed.{number}.{rest}"] = value
            if in_decoder:
                result[f"transformer.decoder.{kind}_embed.{number}.{rest}"] = value
    return result


def shallow(shapes: dict[str, list[int]], encoder: int, decoder: int) -> dict[str, list[int]]:
    """The shapes of a model with fewer layers; heads of the encoder follow those of the layers."""
    result = {}
    for key, shape in shapes.items():
        layer = re.match(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.", key)
        if layer and int(layer[2]) >= {"encoder": encoder, "decoder": decoder}[layer[1]]:
            continue
        if match := _PREDICTOR.match(key):
            if decoder <= int(match[2]) < 6:
                continue
            key = key.replace("_embed.6.", f"_embed.{decoder}.")
        result[key] = shape
    return result


def write_small_checkpoint(path: Path) -> dict[str, Tensor]:
    """A Deformable DETR for COCO's classes as the released code writes it; its entries.

    The names are those of torchvision's blocks: shrink backbones to `TinyBlocks` first.
    """
    torch.manual_seed(0)
    # the number of heads of all released files, which they do not record
    config = small_head_config(
        "deformable_detr", num_labels=91, num_attention_heads=8, backbone_norm="frozen"
    )
    state = to_official(HEADS["deformable_detr"].model(config).state_dict(), config)
    arguments = argparse.Namespace(lr=2e-4, masks=False, dataset_file="coco")
    torch.save({"model": state, "epoch": 49, "args": arguments}, path)
    return state


def hollow(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these shapes that take no memory."""
    return {
        key: torch.zeros((), dtype=torch.int64 if "num_batches" in key else None).expand(shape)
        for key, shape in shapes.items()
    }


def small_state(variant: str = "base") -> dict[str, Tensor]:
    """Entries of a Deformable DETR with one layer."""
    entries = shallow(listed_shapes("deformable_detr", variant, None), 1, 1)
    return hollow(with_second_names(entries, "deformable_detr", variant, 1))
