"""DINO: mixed query selection, look forward twice, and contrastive denoising.

Reference:
    Zhang et al., DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection,
    ICLR 2023 (arXiv 2203.03605). Checked against the released code, IDEA-Research/DINO
    (Apache-2.0).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

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
)
from detrelay.heads.deformable.denoising import Denoising, DenoisingConfig, no_targets
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
    QuerySet,
    decoder_layers,
)
from detrelay.heads.deformable.proposals import ProposalFeatures, best_tokens, take_tokens
from detrelay.heads.query_sets import DECODER, HYBRID

_GRID_TEMPERATURE = 20.0
_GRID_OFFSET = 0.0
# keeps boxes away from 0 and 1 where their logit is taken
_EPSILON = 1e-3


@strict
class DinoConfig(DenoisingConfig):
    """Configuration of DINO; the defaults are the published ResNet-50 4-scale model.

    The 5-scale model has `num_levels` 5 and `num_backbone_levels` 4. The released options
    `label_noise_ratio` 0.5 and `dn_number` 100 are `label_flip_chance` 0.25 and
    `denoising_queries` 100 here; a `dn_number` n below 50 made 2 n groups there.

    Reference:
        Zhang et al., ICLR 2023; released configs `DINO_4scale` and `DINO_5scale`, with the box
        noise set by the released training scripts.
    """

    model_type = "detrelay_dino"

    num_queries: int = 900
    ffn_dim: int = 2048
    dropout: float | int = 0.0

    def stage_groups(self) -> tuple[GroupFacts, ...]:
        """The decoder, the proposals that its queries start from, other passes and denoising."""
        return (
            GroupFacts(DECODER, references=True),
            GroupFacts("proposals", slots=DECODER, references=True),
            *(replace(group, references=True) for group in self.pass_groups),
            *self.denoising_group(),
        )


class DinoHead(DecoderHead):
    """Encoder, proposals, denoising queries and the decoder's stages."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__(config)
        dim, classes = config.d_model, config.num_labels or 0
        self.encoder = DeformableEncoder(config, _GRID_TEMPERATURE, _GRID_OFFSET)
        self.proposal_features = ProposalFeatures(dim)
        self.classify_proposals = nn.Linear(dim, classes)
        self.refine_proposals = Mlp(dim, dim, dim, 4)
        self.content = nn.Embedding(config.num_queries, dim)
        self.set_content = nn.ModuleList(
            nn.Embedding(count, dim) for count in config.hidden_sets.values()
        )
        self.denoising = (
            None
            if config.denoising_groups == 0
            else Denoising(config, label_dim=dim, contrastive=True, epsilon=_EPSILON)
        )
        self.reference_code = Mlp(2 * dim, dim, dim)
        self.layers = decoder_layers(config)
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes)
        self.refine = Mlp(dim, dim, dim, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class scores start at their prior, boxes at their references."""
        for content in (self.content, *self.set_content):
            nn.init.xavier_uniform_(content.get_parameter("weight"))
        for layer in self.reference_code.layers:
            assert isinstance(layer, nn.Linear)
            xavier_linears(layer)
        for classify in (self.classify, self.classify_proposals):
            reset_class_head(classify)
        reset_box_head(self.refine)
        # both box heads start as copies
        for name, parameter in self.refine_proposals.named_parameters():
            init.copy_(parameter, self.refine.get_parameter(name))

    def forward(
        self, pyramid: FeaturePyramid, targets: Targets | None = None
    ) -> tuple[StageGroup, ...]:
        """Run encoder and decoder.

        Args:
            pyramid: L levels [B, C, H, W], finest first.
            targets: objects to denoise in training.

        Returns:
            Groups "decoder", S stages of logits [B, Q, K] and boxes [B, Q, 4]; "proposals", one
            stage with the Q proposals that the queries start from; in training "denoising", S
            stages [B, P, ...], where P is 0 if the batch has no objects, and those of the other
            passes. Q is smaller than configured if there are fewer tokens than queries.
        """
        memory = self.encoder(pyramid)
        proposals, hidden = self._propose(*memory)
        sets = [QuerySet(DECODER, self._start(proposals.boxes, self.content)), *hidden]
        if self.denoising is not None and self.training:
            if targets is None:
                targets = no_targets(len(proposals.boxes), proposals.boxes)
            sets.insert(0, self.denoising(targets, len(sets[0])).query_set())
        own, *others = self.decode(sets, memory)
        return (own, StageGroup("proposals", (proposals,), slots=DECODER), *others)

    def _propose(self, tokens: Tensor, grid: TokenGrid) -> tuple[StagePrediction, list[QuerySet]]:
        """The best proposals, best first: query k starts from the k-th; and the hidden sets.

        The hybrid set starts from the next best, every query group from the same ones as the
        decoder.
        """
        features, anchors, proposes = self.proposal_features(tokens, grid)
        logits = self.classify_proposals(features)
        count = self.content.num_embeddings
        hybrid = self.hidden_sets.get(HYBRID, 0) if self.training else 0
        best = best_tokens(logits.amax(-1), proposes, count + hybrid)
        anchors = take_tokens(anchors, best)
        steps = self.refine_proposals(take_tokens(features, best))
        boxes = (anchors + steps.to(anchors.dtype)).sigmoid()
        proposals = StagePrediction(
            take_tokens(logits, best)[:, :count], boxes[:, :count], anchors[:, :count].sigmoid()
        )
        sets = []
        if self.training:
            for name, content in zip(self.hidden_sets, self.set_content, strict=True):
                rows = boxes[:, count:] if name == HYBRID else boxes[:, :count]
                sets.append(QuerySet(name, self._start(rows, content)))
        return proposals, sets

    def _start(self, boxes: Tensor, content: nn.Module) -> DecoderState:
        """Queries that start from the first rows of their content at these boxes [B, Q, 4]."""
        references = boxes.detach()
        rows = content.get_parameter("weight")[: references.shape[1]]
        # the same boxes with the gradient of the stage before: a stage's loss looks forward twice
        return DecoderState(
            rows.repeat(references.shape[0], 1, 1), references, supervised=references
        )

    def place(self, state: DecoderState, memory: Memory) -> Tensor:
        """Code of the boxes, y before x, relative to the finest padded level, as released."""
        seen = memory[1].in_levels(state.references)[:, :, 0, [1, 0, 2, 3]]
        code = box_code(seen, state.queries.shape[-1])
        return self.reference_code(code.to(state.queries.dtype))

    def predict(
        self, index: int, queries: Tensor, state: DecoderState
    ) -> tuple[StagePrediction, DecoderState]:
        """Scores and boxes of normed queries; the next stage starts from those before the norm."""
        assert state.supervised is not None
        hidden = self.norm(queries)
        prediction = StagePrediction(
            self.classify(hidden),
            move_boxes(self.refine(hidden), state.supervised, _EPSILON),
            state.references,
        )
        if index == len(self.layers) - 1:
            return prediction, replace(state, queries=queries)
        supervised = move_boxes(self.refine(queries), state.references, _EPSILON)
        return prediction, DecoderState(queries, supervised.detach(), supervised=supervised)


class DinoForObjectDetection(DeformableForObjectDetection):
    """DINO.

    Reference:
        Zhang et al., ICLR 2023; loss numbers of the released code: focal 1 (2 in the matching
        cost), L1 5, GIoU 2.
    """

    config: DinoConfig
    config_class = DinoConfig
    loss_config: ClassVar[LossConfig] = LossConfig(
        class_weight=1.0, giou_epsilon=1e-6, log_epsilon=1e-8
    )

    def __init__(self, config: DinoConfig) -> None:
        super().__init__(config)
        self.head = DinoHead(config)
        self.post_init()
