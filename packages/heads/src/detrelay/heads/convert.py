"""Published checkpoint keys and ours, one table a head."""

from __future__ import annotations

import re
from collections.abc import Sequence

from detrelay.heads.deformable_detr import DeformableDetrConfig

# Official StageInteractor names below `roi_head.bbox_head.{stage}.`, in order of precedence.
_STAGEINTERACTOR_STAGE = (
    (r"iof_tau$", "attention.overlap_scale"),
    (r"attention\.attn\.(in_proj_weight|in_proj_bias)$", r"attention.\1"),
    (r"attention\.attn\.out_proj\.", "attention.out_proj."),
    (r"attention_norm\.", "attention_norm."),
    (r"feat_extractor\.gen_one_d\.0\.", "points.base."),
    (r"feat_extractor\.gen_double_d\.0\.", "points.inner."),
    (r"dynamic_conv\.parameter_generator\.", "mixing.generator."),
    (r"dynamic_conv\.mix_bias\.", "mixing.bias_generator."),
    (r"dynamic_conv\.axis_atten_list\.(\d+)\.", r"mixing.adapters.\1.axis."),
    (r"dynamic_conv\.subbox_local_list\.(\d+)\.", r"mixing.adapters.\1.pattern."),
    (r"dynamic_conv\.M_score_list\.", "mixing.channel_gates."),
    (r"dynamic_conv\.M_score_list_mix_bias\.", "mixing.channel_biases."),
    (r"dynamic_conv\.S_score_list\.", "mixing.pattern_gate."),
    (r"dynamic_conv\.S_score_list2\.", "mixing.point_gate."),
    (r"dynamic_conv\.Wv\.", "mixing.out_proj."),
    (r"dynamic_conv\.Wv_layer_norm\.", "mixing.norm."),
    (r"ffn\.layers\.0\.0\.", "ffn_in."),
    (r"ffn\.layers\.1\.", "ffn_out."),
    (r"ffn_norm\.", "ffn_norm."),
    (r"cls_fcs\.0\.", "classify.hidden."),
    (r"cls_fcs\.1\.", "classify.norm."),
    (r"fc_cls\.", "classify.out."),
    (r"reg_fcs\.0\.", "refine.hidden."),
    (r"reg_fcs\.1\.", "refine.norm."),
    (r"fc_reg\.", "refine.out."),
)

# Entries of official checkpoints that no number depends on, with the reason.
STAGEINTERACTOR_DEAD = {
    r"\.dynamic_conv\.subbox_score_list\.": "softmax over one element: always 1, gradient 0",
    r"\.iou_snyc_statistics\.": "statistics of a norm that is never called",
    r"^rpn_head\.init_proposal_bboxes$": "constant: every query starts as the whole image",
    r"^backbone\.fc\.": "classifier of the ImageNet network",
}


def stageinteractor_name(official: str) -> str | None:
    """Our parameter name for a key of an official StageInteractor checkpoint with a ResNet.

    Args:
        official: key in the checkpoint's `state_dict`.

    Returns:
        None for a dead entry (see `STAGEINTERACTOR_DEAD`).

    Raises:
        ValueError: the key is neither known nor known to be dead.

    Reference:
        MCG-NJU/StageInteractor, released checkpoints.
    """
    if any(re.search(pattern, official) for pattern in STAGEINTERACTOR_DEAD):
        return None
    if official.startswith("backbone."):
        return official
    if official == "rpn_head.init_content_features.weight":
        return "head.content.weight"
    if match := re.match(r"neck\.lateral_convs\.(\d+)\.conv\.(.+)$", official):
        return f"neck.convs.{match[1]}.{match[2]}"
    if official.startswith("neck.gn_out."):
        return official.replace("neck.gn_out.", "neck.norm.")
    if match := re.match(r"roi_head\.bbox_head\.(\d+)\.(.+)$", official):
        for pattern, name in _STAGEINTERACTOR_STAGE:
            if re.match(pattern, match[2]):
                return f"head.stages.{match[1]}." + re.sub(rf"^{pattern}", name, match[2])
    raise ValueError(f"{official}: not a key of an official StageInteractor checkpoint")


# Official names of Deformable DETR and its children, in order of precedence.
_DEFORMABLE = (
    (r"backbone\.0\.body\.", "backbone."),
    (r"input_proj\.(\d+)\.0\.", r"neck.convs.\1."),
    (r"input_proj\.(\d+)\.1\.", r"neck.norms.\1."),
    (r"transformer\.level_embed$", "head.encoder.level_code"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.", r"head.encoder.layers.\1.attention."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.", r"head.encoder.layers.\1.attention_norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"head.encoder.layers.\1.ffn.norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.linear1\.", r"head.encoder.layers.\1.ffn.widen."),
    (r"transformer\.encoder\.layers\.(\d+)\.linear2\.", r"head.encoder.layers.\1.ffn.narrow."),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.", r"head.layers.\1.self_attention."),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.", r"head.layers.\1.cross_attention."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.", r"head.layers.\1.cross_attention_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.", r"head.layers.\1.self_attention_norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"head.layers.\1.ffn.norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.linear1\.", r"head.layers.\1.ffn.widen."),
    (r"transformer\.decoder\.layers\.(\d+)\.linear2\.", r"head.layers.\1.ffn.narrow."),
    (r"transformer\.enc_output\.", "head.proposal_features.project."),
    (r"transformer\.enc_output_norm\.", "head.proposal_features.norm."),
)
_DEFORMABLE_DETR = (
    *_DEFORMABLE,
    (r"query_embed\.", "head.queries."),
    (r"transformer\.reference_points\.", "head.reference."),
    (r"transformer\.pos_trans\.", "head.query_proj."),
    (r"transformer\.pos_trans_norm\.", "head.query_norm."),
)
_DINO = (
    *_DEFORMABLE,
    (r"class_embed\.0\.", "head.classify."),
    (r"bbox_embed\.0\.", "head.refine."),
    (r"label_enc\.", "head.denoising.labels."),
    (r"transformer\.tgt_embed\.", "head.content."),
    (r"transformer\.enc_out_class_embed\.", "head.classify_proposals."),
    (r"transformer\.enc_out_bbox_embed\.", "head.refine_proposals."),
    (r"transformer\.decoder\.norm\.", "head.norm."),
    (r"transformer\.decoder\.ref_point_head\.", "head.reference_code."),
)
# the decoder holds the prediction heads a second time, under these names
_DEFORMABLE_ALIAS = r"transformer\.decoder\.(class_embed|bbox_embed)\."


def deformable_detr_name(official: str, config: DeformableDetrConfig) -> str | None:
    """Our parameter name for a key of an official Deformable DETR checkpoint with a ResNet.

    Args:
        official: key in the checkpoint's `model`.
        config: of the variant; says which prediction heads are copies of each other and which
            belong to the encoder.

    Returns:
        None for a second name of an entry that stands elsewhere.

    Raises:
        ValueError: the key is not known.

    Reference:
        fundamentalvision/Deformable-DETR, released checkpoints.
    """
    if re.match(_DEFORMABLE_ALIAS, official):
        return None
    if match := re.match(r"(class|bbox)_embed\.(\d+)\.(.+)$", official):
        name, index = {"class": "classify", "bbox": "refine"}[match[1]], int(match[2])
        if config.two_stage and index == config.decoder_layers:
            return f"head.{name}_proposals.{match[3]}"
        shared = not config.box_refinement
        return None if shared and index else f"head.{name}.{index}.{match[3]}"
    return _translate(official, _DEFORMABLE_DETR, "Deformable DETR")


def dino_name(official: str) -> str | None:
    """Our parameter name for a key of an official DINO checkpoint with a ResNet.

    The label table `label_enc` has one row more than there are classes; nothing reads it.

    Args:
        official: key in the checkpoint's `model`.

    Returns:
        None for a second name of an entry that stands elsewhere.

    Raises:
        ValueError: the key is not known.

    Reference:
        IDEA-Research/DINO, released checkpoints.
    """
    if re.match(_DEFORMABLE_ALIAS, official) or re.match(r"(class|bbox)_embed\.[1-9]", official):
        return None
    return _translate(official, _DINO, "DINO")


def _translate(official: str, table: Sequence[tuple[str, str]], model: str) -> str:
    """The first entry of `table` that `official` begins with, put in its place."""
    for pattern, name in table:
        if re.match(pattern, official):
            return re.sub(rf"^{pattern}", name, official)
    raise ValueError(f"{official}: not a key of an official {model} checkpoint")
