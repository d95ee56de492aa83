"""The parameter names of the released code and the corresponding names here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from detrelay.core.backbones import SWINS
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.weights.key_table import KeyTable
from detrelay.heads.deformable.detr import DeformableDetrConfig
from detrelay.heads.deformable.dino import DinoConfig
from detrelay.heads.stageinteractor.config import ADAMIXER, StageInteractorConfig

_RESNET = "torchvision_resnet"
_STAGE, _OUR_STAGE = "roi_head.bbox_head.{}.", "head.stages.{}."
_ADAMIXER_AND_STAGEINTERACTOR = (
    ("rpn_head.init_content_features.", "head.content."),
    ("neck.lateral_convs.{}.conv.", "neck.convs.{}."),
    ("neck.gn_out.", "neck.norm."),
    *[
        (_STAGE + theirs, _OUR_STAGE + ours)
        for theirs, ours in (
            ("iof_tau", "attention.overlap_scale"),
            ("attention.attn.in_proj_weight", "attention.in_proj_weight"),
            ("attention.attn.in_proj_bias", "attention.in_proj_bias"),
            ("attention.attn.out_proj.", "attention.out_proj."),
            ("attention_norm.", "attention_norm."),
            ("ffn.layers.0.0.", "ffn_in."),
            ("ffn.layers.1.", "ffn_out."),
            ("ffn_norm.", "ffn_norm."),
            ("cls_fcs.0.", "classify.hidden."),
            ("cls_fcs.1.", "classify.norm."),
            ("fc_cls.", "classify.out."),
            ("reg_fcs.0.", "refine.hidden."),
            ("reg_fcs.1.", "refine.norm."),
            ("fc_reg.", "refine.out."),
        )
    ],
)
_STAGEINTERACTOR = KeyTable(
    *_ADAMIXER_AND_STAGEINTERACTOR,
    *[
        (_STAGE + theirs, _OUR_STAGE + ours)
        for theirs, ours in (
            ("feat_extractor.gen_one_d.0.", "points.base."),
            ("feat_extractor.gen_double_d.0.", "points.inner."),
            ("dynamic_conv.parameter_generator.", "mixing.generator."),
            ("dynamic_conv.mix_bias.", "mixing.bias_generator."),
            ("dynamic_conv.axis_atten_list.{}.", "mixing.adapters.{}.axis."),
            ("dynamic_conv.subbox_local_list.{}.", "mixing.adapters.{}.pattern."),
            ("dynamic_conv.M_score_list.", "mixing.channel_gates."),
            ("dynamic_conv.M_score_list_mix_bias.", "mixing.channel_biases."),
            ("dynamic_conv.S_score_list.", "mixing.pattern_gate."),
            ("dynamic_conv.S_score_list2.", "mixing.point_gate."),
            ("dynamic_conv.Wv.", "mixing.out_proj."),
            ("dynamic_conv.Wv_layer_norm.", "mixing.norm."),
        )
    ],
)
_ADAMIXER = KeyTable(
    *_ADAMIXER_AND_STAGEINTERACTOR,
    *[
        (f"{_STAGE}sampling_n_mixing.{theirs}", _OUR_STAGE + ours)
        for theirs, ours in (
            ("sampling_offset_generator.0.", "points.base."),
            ("adaptive_mixing.parameter_generator.0.", "mixing.generator."),
            ("adaptive_mixing.out_proj.", "mixing.out_proj."),
            ("norm.", "mixing.norm."),
        )
    ],
)
_ADAMIXER_START = "rpn_head.init_proposal_bboxes.weight"
# Entries of released checkpoints that affect no output, with the reason.
_STAGEINTERACTOR_DEAD = {
    r"\.dynamic_conv\.subbox_score_list\.": "softmax over one element: always 1, gradient 0",
    r"\.iou_snyc_statistics\.": "statistics of a norm that is never called",
    r"^rpn_head\.init_proposal_bboxes$": "constant: every query starts as the whole image",
}

_ENCODER, _OUR_ENCODER = "transformer.encoder.layers.{}.", "head.encoder.layers.{}."
_DECODER, _OUR_DECODER = "transformer.decoder.layers.{}.", "head.layers.{}."
_DEFORMABLE = (
    ("input_proj.{}.0.", "neck.convs.{}."),
    ("input_proj.{}.1.", "neck.norms.{}."),
    ("transformer.level_embed", "head.encoder.level_code"),
    (f"{_ENCODER}self_attn.", f"{_OUR_ENCODER}attention."),
    (f"{_ENCODER}norm1.", f"{_OUR_ENCODER}attention_norm."),
    (f"{_ENCODER}norm2.", f"{_OUR_ENCODER}ffn.norm."),
    (f"{_ENCODER}linear1.", f"{_OUR_ENCODER}ffn.widen."),
    (f"{_ENCODER}linear2.", f"{_OUR_ENCODER}ffn.narrow."),
    (f"{_DECODER}self_attn.", f"{_OUR_DECODER}self_attention."),
    (f"{_DECODER}cross_attn.", f"{_OUR_DECODER}cross_attention."),
    (f"{_DECODER}norm1.", f"{_OUR_DECODER}cross_attention_norm."),
    (f"{_DECODER}norm2.", f"{_OUR_DECODER}self_attention_norm."),
    (f"{_DECODER}norm3.", f"{_OUR_DECODER}ffn.norm."),
    (f"{_DECODER}linear1.", f"{_OUR_DECODER}ffn.widen."),
    (f"{_DECODER}linear2.", f"{_OUR_DECODER}ffn.narrow."),
    ("transformer.enc_output.", "head.proposal_features.project."),
    ("transformer.enc_output_norm.", "head.proposal_features.norm."),
)
_DEFORMABLE_DETR = (
    *_DEFORMABLE,
    ("class_embed.{}.", "head.classify.{}."),
    ("bbox_embed.{}.", "head.refine.{}."),
    ("query_embed.", "head.queries."),
    ("transformer.reference_points.", "head.reference."),
    ("transformer.pos_trans.", "head.query_proj."),
    ("transformer.pos_trans_norm.", "head.query_norm."),
)
_DINO = KeyTable(
    *_DEFORMABLE,
    ("class_embed.0.", "head.classify."),
    ("bbox_embed.0.", "head.refine."),
    ("label_enc.", "head.denoising.labels."),
    ("transformer.tgt_embed.", "head.content."),
    ("transformer.enc_out_class_embed.", "head.classify_proposals."),
    ("transformer.enc_out_bbox_embed.", "head.refine_proposals."),
    ("transformer.decoder.norm.", "head.norm."),
    ("transformer.decoder.ref_point_head.", "head.reference_code."),
)
_PREDICTOR = re.compile(r"(transformer\.decoder\.)?(class|bbox)_embed\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Layout:
    """How the released code stores the models of a head.

    Attributes:
        table: names outside the backbone.
        backbone: prefix of the names of the backbone.
        naming: the names of the backbone, one of `NAMINGS`.
        dead: patterns of names that affect no output, with the reason.
        constants: entries that must equal these tables, which our models do not store.
        predictors: how many class heads and box heads are listed; 0 where there is no such list.
        shared: the listed heads are one and the same.
        decoder_has: which of "class" and "bbox" appear a second time as parts of the decoder.
        spare_rows: our tables whose released counterpart has an unused last row.
        counts_batches: norms of the backbone have the number of batches they have seen.
    """

    table: KeyTable
    backbone: str
    naming: str
    dead: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    predictors: int = 0
    shared: bool = False
    decoder_has: tuple[str, ...] = ()
    spare_rows: tuple[str, ...] = ()
    counts_batches: bool = False

    def first_name(self, theirs: str) -> str:
        """The name in the table of an entry that may have several names."""
        match = _PREDICTOR.match(theirs)
        if match is None or not self.predictors:
            return theirs
        return f"{match[2]}_embed.{0 if self.shared else match[3]}.{match[4]}"

    def all_names(self, first: str) -> list[str]:
        """All names of an entry, the one in the table first."""
        match = _PREDICTOR.match(first)
        if match is None or not self.predictors:
            return [first]
        indices = range(self.predictors) if self.shared else [int(match[3])]
        names = [f"{match[2]}_embed.{index}.{match[4]}" for index in indices]
        if match[2] in self.decoder_has:
            names += [f"transformer.decoder.{name}" for name in names]
        return names


def layout_of(config: DetectorConfig) -> Layout:
    """The layout of the released code for this config's head.

    Raises:
        ValueError: there is no released code for it.

    Reference:
        Released checkpoints of MCG-NJU/StageInteractor, fundamentalvision/Deformable-DETR and
        IDEA-Research/DINO; released code of MCG-NJU/AdaMixer.
    """
    swin = config.backbone_name in SWINS
    if isinstance(config, StageInteractorConfig):
        naming = "mmdetection_swin" if swin else _RESNET
        if all(getattr(config, name) == value for name, value in ADAMIXER.items()):
            whole_images = torch.tensor([0.5, 0.5, 1, 1]).repeat(config.num_queries, 1)
            return Layout(
                _ADAMIXER,
                "backbone.",
                naming,
                constants={_ADAMIXER_START: whole_images},
                counts_batches=True,
            )
        return Layout(
            _STAGEINTERACTOR, "backbone.", naming, _STAGEINTERACTOR_DEAD, counts_batches=True
        )
    backbone, naming = ("backbone.0.", "swin") if swin else ("backbone.0.body.", _RESNET)
    if isinstance(config, DinoConfig):
        return Layout(
            _DINO,
            backbone,
            naming,
            predictors=config.decoder_layers,
            shared=True,
            decoder_has=("class", "bbox"),
            spare_rows=("head.denoising.labels.weight",),
        )
    if isinstance(config, DeformableDetrConfig):
        return _deformable_layout(config, backbone, naming)
    raise ValueError(f"{config.model_type}: no released checkpoints are known for this head")


def _deformable_layout(config: DeformableDetrConfig, backbone: str, naming: str) -> Layout:
    rows: tuple[tuple[str, str], ...] = _DEFORMABLE_DETR
    if config.two_stage:  # the last heads listed belong to the encoder
        last = config.decoder_layers
        rows = (
            (f"class_embed.{last}.", "head.classify_proposals."),
            (f"bbox_embed.{last}.", "head.refine_proposals."),
            *rows,
        )
    repeated = (*["bbox"] * config.box_refinement, *["class"] * config.two_stage)
    return Layout(
        KeyTable(*rows),
        backbone,
        naming,
        predictors=config.decoder_layers + config.two_stage,
        shared=not config.box_refinement,
        decoder_has=repeated,
    )
