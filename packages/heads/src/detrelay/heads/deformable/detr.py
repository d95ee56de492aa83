"""Deformable DETR: base, with iterative box refinement, and two-stage.

Reference:
    Zhu et al., Deformable DETR: Deformable Transformers for End-to-End Object Detection, ICLR 2021
    (arXiv 2010.04159). Checked against the released code, fundamentalvision/Deformable-DETR
    (Apache-2.0), and against `DeformableDetrForObjectDetection` of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from detrelay.core.losses import LossConfig
from detrelay.core.structures import (
    FeaturePyramid,
    GroupFacts,
    StageGroup,
    StagePrediction,
    Targets,
    at_least_float32,
)
from detrelay.heads.deformable.layers import (
    DeformableEncoder,
    DeformableForObjectDetection,
    Mlp,
    TokenGrid,
    box_code,
    move_boxes,
    reset_box_head,
    reset_class_head,
    xavier_linears,
)
from detrelay.heads.deformable.passes import (
    DecoderHead,
    DecoderState,
    Memory,
    PassesConfig,
    QuerySet,
    decoder_layers,
)
from detrelay.heads.deformable.proposals import ProposalFeatures, best_tokens, take_tokens
from detrelay.heads.query_sets import DECODER, HYBRID

_GRID_TEMPERATURE = 10000.0
_GRID_OFFSET = -0.5
# keeps references away from 0 and 1 where their logit is taken
_EPSILON = 1e-5
# initial step from a reference point: the last two numbers are the logits of the box size
_FIRST_STEP = (0.0, 0.0, -2.0, -2.0)


@strict
class DeformableDetrConfig(PassesConfig):
    """Configuration of Deformable DETR; the defaults are the published ResNet-50 base model.

    Attributes:
        box_refinement: every stage refines the boxes of the stage before, with heads of its own;
            otherwise all stages start from the same points and share their heads.
        two_stage: queries start from the encoder's best proposals; needs `box_refinement`.

    Reference:
        Zhu et al., ICLR 2021, table 1: 44.5, 46.2 and 46.9 AP after 50 epochs.
    """

    model_type = "detrelay_deformable_detr"

    box_refinement: bool = False
    two_stage: bool = False

    def validate_architecture(self) -> None:
        """Reject two stages without refinement."""
        super().validate_architecture()
        if self.two_stage and not self.box_refinement:
            raise ValueError("two_stage needs box_refinement; set box_refinement to true")

    def stage_groups(self) -> tuple[GroupFacts, ...]:
        """The decoder, for two-stage models the proposals, and other passes."""
        proposals = GroupFacts("proposals", class_agnostic=True, references=True)
        return (
            # without proposals the first stage starts from points
            GroupFacts(DECODER, references=self.two_stage),
            *((proposals,) if self.two_stage else ()),
            *(
                replace(group, references=self.two_stage or group.references)
                for group in self.pass_groups
            ),
        )


class DeformableDetrHead(DecoderHead):
    """Encoder, queries and the decoder's stages."""

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__(config)
        dim, classes = config.d_model, config.num_labels or 0
        self.num_queries = config.num_queries
        self.box_refinement = config.box_refinement
        self.two_stage = config.two_stage
        self.encoder = DeformableEncoder(config, _GRID_TEMPERATURE, _GRID_OFFSET)
        if config.two_stage:
            self.proposal_features = ProposalFeatures(dim)
            self.classify_proposals = nn.Linear(dim, classes)
            self.refine_proposals = Mlp(dim, dim, dim, 4)
            self.query_proj = nn.Linear(2 * dim, 2 * dim)
            self.query_norm = nn.LayerNorm(2 * dim)
        else:
            self.queries = nn.Embedding(config.num_queries, 2 * dim)
            self.set_queries = nn.ModuleList(
                nn.Embedding(count, 2 * dim) for count in config.hidden_sets.values()
            )
            self.reference = nn.Linear(dim, 2)
        self.layers = decoder_layers(config)
        heads = config.decoder_layers if config.box_refinement else 1
        self.classify = nn.ModuleList(nn.Linear(dim, classes) for _ in range(heads))
        self.refine = nn.ModuleList(Mlp(dim, dim, dim, 4) for _ in range(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class scores start at their prior, boxes at their references."""
        for head in self.classify:
            reset_class_head(head)
        for head in self.refine:
            reset_box_head(head)
        if self.two_stage:
            reset_class_head(self.classify_proposals)
            reset_box_head(self.refine_proposals)
            xavier_linears(self.query_proj)
        else:
            xavier_linears(self.reference)
            nn.init.zeros_(self.reference.bias)
            first = self.refine[0]
            assert isinstance(first, Mlp)
            init.copy_(first.layers[-1].get_parameter("bias"), torch.tensor(_FIRST_STEP))

    def forward(
        self, pyramid: FeaturePyramid, targets: Targets | None = None
    ) -> tuple[StageGroup, ...]:
        """Run encoder and decoder.

        Args:
            pyramid: L levels [B, C, H, W], finest first.
            targets: unused; the signature is that of heads that denoise.

        Returns:
            Group "decoder", S stages of logits [B, Q, K] and boxes [B, Q, 4]; two-stage models add
            "proposals", one class-agnostic stage in which every token is a query; in training also
            those of the other passes. Q is smaller than configured if there are fewer tokens than
            queries.
        """
        memory = self.encoder(pyramid)
        if not self.two_stage:
            return self.decode(self._learned(pyramid.image_sizes.shape[0]), memory)
        sets, proposals = self._propose(*memory)
        own, *others = self.decode(sets, memory)
        return (own, StageGroup("proposals", (proposals,), class_agnostic=True), *others)

    def _learned(self, batch: int) -> list[QuerySet]:
        """The decoder's own queries and, in training, the hidden sets."""
        hidden = zip(self.hidden_sets, self.set_queries, strict=True) if self.training else ()
        sets = []
        for name, queries in ((DECODER, self.queries), *hidden):
            rows = queries.get_parameter("weight").expand(batch, -1, -1)
            position, content = rows.chunk(2, dim=-1)
            references = at_least_float32(self.reference(position)).sigmoid()
            sets.append(QuerySet(name, DecoderState(content, references, position)))
        return sets

    def _propose(self, tokens: Tensor, grid: TokenGrid) -> tuple[list[QuerySet], StagePrediction]:
        """Query sets that start from the best proposals; and all proposals.

        The hybrid set starts from the next best, every query group from the same ones as the
        decoder.
        """
        features, anchors, proposes = self.proposal_features(tokens, grid)
        logits = self.classify_proposals(features)
        boxes = anchors + self.refine_proposals(features).to(anchors.dtype)
        hidden = self.hidden_sets if self.training else {}
        count = self.num_queries
        # class 0 stands for "object"
        best = best_tokens(logits[..., 0], proposes, count + hidden.get(HYBRID, 0))
        references = take_tokens(boxes, best).detach().sigmoid()
        code = box_code(references, tokens.shape[-1]).to(tokens.dtype)
        position, content = self.query_norm(self.query_proj(code)).chunk(2, dim=-1)
        start = DecoderState(content, references, position)
        own, rest = start.rows(slice(count)), start.rows(slice(count, None))
        sets = [QuerySet(name, rest if name == HYBRID else own) for name in (DECODER, *hidden)]
        # a token without an anchor must not be matched
        matched = anchors.sigmoid().masked_fill(~proposes[..., None], 0)
        return sets, StagePrediction(logits, boxes.sigmoid(), matched)

    def place(self, state: DecoderState, memory: Memory) -> Tensor:
        """The same code in every stage."""
        assert state.position is not None
        return state.position

    def predict(
        self, index: int, queries: Tensor, state: DecoderState
    ) -> tuple[StagePrediction, DecoderState]:
        """Scores and boxes; with refinement the next stage starts from these boxes."""
        head = index if self.box_refinement else 0
        boxes = move_boxes(self.refine[head](queries), state.references, _EPSILON)
        references = state.references if state.references.shape[-1] == 4 else None
        prediction = StagePrediction(self.classify[head](queries), boxes, references)
        start = boxes.detach() if self.box_refinement else state.references
        return prediction, replace(state, queries=queries, references=start)


class DeformableDetrForObjectDetection(DeformableForObjectDetection):
    """Deformable DETR.

    Reference:
        Zhu et al., ICLR 2021; loss numbers of the released code: focal 2, L1 5, GIoU 2.
    """

    config: DeformableDetrConfig
    config_class = DeformableDetrConfig
    loss_config: ClassVar[LossConfig] = LossConfig(log_epsilon=1e-8)
    object_scores: ClassVar[tuple[str, ...]] = ("head.classify_proposals",)

    def __init__(self, config: DeformableDetrConfig) -> None:
        super().__init__(config)
        self.head = DeformableDetrHead(config)
        self.post_init()
