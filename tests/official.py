"""Entries of released checkpoints: names and shapes, from the lists that were made of them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "assets"
# head, its variant, the list it stands in, and the list that names the rest
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
    """Shapes by name, as a file has them: with the second names of shared heads."""
    shapes = dict(listed_shapes(head, name, base))
    if head == "stageinteractor":
        return shapes
    predictor = re.compile(r"(class|bbox)_embed\.(\d+)\.(.+)$")
    shared = head == "dino" or name == "base"
    for key, shape in list(shapes.items()):
        if match := predictor.match(key):
            kind, index, rest = match.groups()
            for number in range(6) if shared else [index]:
                shapes[f"{kind}_embed.{number}.{rest}"] = shape
                in_decoder = head == "dino" or name == "two_stage" or (
                    name == "refine" and kind == "bbox"
                )  # fmt: skip
                if in_decoder:
                    shapes[f"transformer.decoder.{kind}_embed.{number}.{rest}"] = shape
    return shapes


def hollow(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these shapes that take no memory."""
    return {
        key: torch.zeros((), dtype=torch.int64 if "num_batches" in key else None).expand(shape)
        for key, shape in shapes.items()
    }
