"""Infer a model's config from the names and shapes in a released checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detrelay.core.backbones import SWINS
from detrelay.core.backbones.naming import find_backbone, find_naming
from detrelay.heads.stageinteractor.config import ADAMIXER

Shapes = Mapping[str, Tensor]

_BACKBONES_AND_QUERIES: dict[str, dict[str, Any]] = {
    "r50_1x": {"backbone_name": "resnet50", "num_queries": 100},
    "r101_3x": {"backbone_name": "resnet101", "num_queries": 100},
    "r50_300": {"backbone_name": "resnet50", "num_queries": 300},
    "r101_300": {"backbone_name": "resnet101", "num_queries": 300},
    "dx101_300": {"backbone_name": "resnext101_32x4d_dcn", "num_queries": 300},
    "swin_s_300": {"backbone_name": "swin_s", "num_queries": 300},
}
# The published models of each head, by the values that tell them apart.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "stageinteractor": _BACKBONES_AND_QUERIES,
    "adamixer": _BACKBONES_AND_QUERIES,
    "deformable_detr": {
        "base": {"box_refinement": False, "two_stage": False},
        "refine": {"box_refinement": True, "two_stage": False},
        "two_stage": {"box_refinement": True, "two_stage": True},
    },
    "dino": {
        "r50_4scale": {"backbone_name": "resnet50", "num_levels": 4},
        "r50_5scale": {"backbone_name": "resnet50", "num_levels": 5},
        "swin_l_4scale": {"backbone_name": "swin_l", "num_levels": 4},
        "swin_l_5scale": {"backbone_name": "swin_l", "num_levels": 5},
    },
}
# The released code of each head: its repository on GitHub.
PROGRAMS = {
    "stageinteractor": "MCG-NJU/StageInteractor",
    "adamixer": "MCG-NJU/AdaMixer",
    "deformable_detr": "fundamentalvision/Deformable-DETR",
    "dino": "IDEA-Research/DINO",
}
# an entry that all checkpoints of a head have and those of other heads lack
_TELLTALE = {
    "stageinteractor": "roi_head.bbox_head.0.dynamic_conv.Wv.weight",
    "adamixer": "roi_head.bbox_head.0.sampling_n_mixing.norm.weight",
    "dino": "transformer.enc_out_class_embed.weight",
    "deformable_detr": "transformer.level_embed",
}
_MMDETECTION = ("stageinteractor", "adamixer")
# not in the shapes
_ATTENTION_HEADS = 8
_DINO_SWIN_DROP_PATH = 0.2
_NO_CLASS = ("__background__", "N/A")


def guess_head(state: Shapes) -> str:
    """The head whose released code wrote these entries.

    Raises:
        ValueError: no known head did.
    """
    for head, key in _TELLTALE.items():
        if key in state:
            return head
    raise ValueError(
        f"no head is known by these names, such as {', '.join(sorted(state)[:3])}; expected a "
        f"released checkpoint of {', '.join(VARIANTS)}"
    )


def read_sizes(state: Shapes, head: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Config values of the model in a checkpoint.

    Args:
        state: under the names of the released code.
        head: one of `VARIANTS`.
        settings: config values that the shapes do not tell, as far as known; Deformable DETR and
            DINO default to 8 attention heads.

    Raises:
        ValueError: an entry that tells a size is missing, or the backbone is unknown.
    """
    if _TELLTALE[head] not in state:
        raise ValueError(f"not a checkpoint of {head}: it has no {_TELLTALE[head]}")
    try:
        sizes = (
            _mmdetection_sizes(state, head)
            if head in _MMDETECTION
            else _deformable_sizes(
                state, head, settings.get("num_attention_heads", _ATTENTION_HEADS)
            )
        )
    except KeyError as error:
        raise ValueError(f"not a whole checkpoint of {head}: it has no {error.args[0]}") from error
    backbone = _backbone_name(state)
    swin = backbone in SWINS
    sizes["backbone_name"] = backbone
    sizes["backbone_norm"] = "eval" if head in _MMDETECTION else "frozen"
    sizes["backbone_frozen_stages"] = 0 if swin else 1
    if head == "dino" and swin:
        sizes["backbone_drop_path"] = _DINO_SWIN_DROP_PATH
    return {**sizes, **_classes(sizes.pop("num_labels"))}


def match_variant(sizes: Mapping[str, Any], head: str, requested: str | None) -> str | None:
    """The published model that has these sizes, None for other sizes.

    Raises:
        ValueError: `requested` names an unknown variant, or another one.
    """
    variants = VARIANTS[head]
    found = next(
        (name for name, values in variants.items() if values.items() <= sizes.items()), None
    )
    if requested is None or requested == found:
        return found
    if requested not in variants:
        raise ValueError(f"unknown variant {requested} of {head}; known are {', '.join(variants)}")
    other = ", ".join(
        f"{key} {sizes[key]} instead of {value}"
        for key, value in variants[requested].items()
        if sizes[key] != value
    )
    hint = "none that was published" if found is None else found
    raise ValueError(f"the checkpoint is not variant {requested} of {head}: {other}; it is {hint}")


def _mmdetection_sizes(state: Shapes, head: str) -> dict[str, Any]:
    stage = "roi_head.bbox_head.{}.{}".format
    num_queries, dim = state["rpn_head.init_content_features.weight"].shape
    num_stages = _count(state, r"roi_head\.bbox_head\.(\d+)\.")
    points_of = _adamixer_points if head == "adamixer" else _stageinteractor_points
    return {
        "num_queries": num_queries,
        "d_model": dim,
        "num_levels": _count(state, r"neck\.lateral_convs\.(\d+)\."),
        "num_attention_heads": len(state[stage(0, "iof_tau")]),
        "num_stages": num_stages,
        **points_of(state, [stage(index, "") for index in (0, min(1, num_stages - 1))], dim),
        "ffn_dim": len(state[stage(0, "ffn.layers.0.0.bias")]),
        "num_labels": len(state[stage(0, "fc_cls.bias")]),
    }


def _stageinteractor_points(state: Shapes, stages: list[str], dim: int) -> dict[str, Any]:
    """Sizes of sampling and mixing, from the names of the first two stages."""
    mixing = f"{stages[0]}dynamic_conv."
    out_points = state[f"{mixing}Wv.weight"].shape[1] // dim
    groups = (len(state[f"{mixing}mix_bias.bias"]) - dim) // out_points
    first, later = (
        len(state[f"{stage}feat_extractor.gen_one_d.0.bias"]) // (3 * groups) for stage in stages
    )
    return {
        "num_groups": groups,
        "pattern_size": len(state[f"{stages[0]}feat_extractor.gen_double_d.0.bias"]) // 3,
        "num_base_points_first": first,
        "num_base_points": later,
        "num_out_points": out_points,
    }


def _adamixer_points(state: Shapes, stages: list[str], dim: int) -> dict[str, Any]:
    """The same for AdaMixer, whose points have no inner pattern."""
    sampling = "sampling_n_mixing.sampling_offset_generator.0.bias"
    mixing = f"{stages[0]}sampling_n_mixing.adaptive_mixing."
    first, later = (len(state[stage + sampling]) // 3 for stage in stages)  # of all groups
    out_points = state[f"{mixing}out_proj.weight"].shape[1] // dim
    # G filters of (C / G)^2, and one of O rows for the points of each group
    channel = len(state[f"{mixing}parameter_generator.0.bias"]) - first * out_points
    groups = dim**2 // channel if 0 < channel <= dim**2 else 1
    return {
        **ADAMIXER,
        "num_groups": groups,
        "pattern_size": 1,
        "num_base_points_first": first // groups,
        "num_base_points": later // groups,
        "num_out_points": out_points,
    }


def _deformable_sizes(state: Shapes, head: str, num_heads: int) -> dict[str, Any]:
    num_levels, dim = state["transformer.level_embed"].shape
    layer = "transformer.encoder.layers.0."
    per_level = len(state[f"{layer}self_attn.attention_weights.bias"]) // num_levels
    maps = [state[f"input_proj.{level}.0.weight"].shape[-1] == 1 for level in range(num_levels)]
    sizes = {
        "d_model": dim,
        "num_levels": num_levels,
        # a single level is a 1x1 convolution of the last map too
        "num_backbone_levels": sum(maps),
        "num_attention_heads": num_heads,
        "num_points": per_level // num_heads,
        "encoder_layers": _count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "ffn_dim": len(state[f"{layer}linear1.bias"]),
        "num_labels": len(state["class_embed.0.bias"]),
    }
    if head == "dino":
        return {**sizes, "num_queries": len(state["transformer.tgt_embed.weight"])}
    sizes["two_stage"] = "transformer.enc_output.weight" in state
    sizes["box_refinement"] = sizes["two_stage"] or _refines(state)
    if not sizes["two_stage"]:  # with proposals as queries no shape tells their number
        sizes["num_queries"] = len(state["query_embed.weight"])
    return sizes


def _refines(state: Shapes) -> bool:
    """Whether each layer has a box head of its own."""
    if any(key.startswith("transformer.decoder.bbox_embed.") for key in state):
        return True
    ends = [key[12:] for key in state if key.startswith("bbox_embed.1.")]
    return any(not state[f"bbox_embed.0{e}"].equal(state[f"bbox_embed.1{e}"]) for e in ends)


def _backbone_name(state: Shapes) -> str:
    own = {key: value for key, value in state.items() if key.startswith("backbone.")}
    naming, prefix = find_naming(own)
    ours, _, _ = naming.to_ours({key.removeprefix(prefix): value for key, value in own.items()})
    return find_backbone(ours)


def _count(state: Shapes, pattern: str) -> int:
    """How many different numbers follow `pattern` in the names."""
    matches = (re.match(pattern, key) for key in state)
    return len({match[1] for match in matches if match})


def _classes(count: int) -> dict[str, Any]:
    """Names and original ids of COCO's classes, listed without gaps (80) or by id (91)."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    ids = [index for index, name in enumerate(names) if name not in _NO_CLASS]
    if count == len(ids):
        labels = {index: names[category] for index, category in enumerate(ids)}
    elif count == len(names):
        ids = list(range(count))
        labels = {index: "N/A" if names[index] in _NO_CLASS else names[index] for index in ids}
    else:
        return {"num_labels": count}
    return {
        "id2label": labels,
        "label2id": {name: index for index, name in labels.items()},
        "category_ids": ids,
    }
