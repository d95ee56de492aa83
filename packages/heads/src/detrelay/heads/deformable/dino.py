"""DINO: mixed query selection, look forward twice, and contrastive denoising.

Reference:
    Zhang et al., DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection,
    ICLR 2023 (arXiv 2203.03605). Checked against the released code, IDEA-Research/DINO
    (Apache-2.0).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init

from detrelay.core.losses import LossConfig
from detrelay.core.structures import FeaturePyramid, StageGroup, StagePrediction, Targets
from detrelay.heads.deformable.denoising import (
    Denoising,
    DenoisingConfig,
    DenoisingQueries,
    no_targets,
)
from detrelay.heads.deformable.layers import (
    DecoderLayer,
    DeformableEncoder,
    DeformableForObjectDetection,
    Mlp,
    ProposalFeatures,
    TokenGrid,
    best_tokens,
    box_code,
    move_boxes,
    reset_box_head,
    reset_class_head,
    take_tokens,
    xavier_linears,
)

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
        noise that the released training scripts set.
    """

    model_type = "detrelay_dino"

    num_queries: int = 900
    ffn_dim: int = 2048
    dropout: float | int = 0.0


class DinoHead(nn.Module):
    """Encoder, proposals, denoising queries and the decoder's stages."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        dim, classes = config.d_model, config.num_labels or 0
        self.encoder = DeformableEncoder(config, _GRID_TEMPERATURE, _GRID_OFFSET)
        self.proposal_features = ProposalFeatures(dim)
        self.classify_proposals = nn.Linear(dim, classes)
        self.refine_proposals = Mlp(dim, dim, dim, 4)
        self.content = nn.Embedding(config.num_queries, dim)
        self.denoising = (
            None
            if config.denoising_groups == 0
            else Denoising(config, label_dim=dim, contrastive=True, epsilon=_EPSILON)
        )
        self.reference_code = Mlp(2 * dim, dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim)
        self.classify = nn.Linear(dim, classes)
        self.refine = Mlp(dim, dim, dim, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class scores start at their prior, boxes at their references."""
        nn.init.xavier_uniform_(self.content.weight)
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
            stages [B, P, ...], where P is 0 if the batch has no objects. Q is less than configured
            where there are fewer tokens than queries.
        """
        memory = self.encoder(pyramid)
        proposals = self._propose(*memory)
        references = proposals.boxes.detach()
        count = references.shape[1]
        queries = self.content.weight[:count].expand(len(references), -1, -1)
        denoising: DenoisingQueries | None = None
        if self.denoising is not None and self.training:
            if targets is None:
                targets = no_targets(len(references), references)
            denoising = self.denoising(targets, count)
            queries = torch.cat([denoising.content.to(queries.dtype), queries], dim=1)
            references = torch.cat([denoising.references.to(references.dtype), references], dim=1)
        stages = self._decode(
            queries, references, memory, None if denoising is None else denoising.blocked
        )
        own = tuple(StagePrediction(s.logits[:, -count:], s.boxes[:, -count:]) for s in stages)
        groups = (StageGroup("decoder", own), StageGroup("proposals", (proposals,)))
        if denoising is None:
            return groups
        noisy = tuple(StagePrediction(s.logits[:, :-count], s.boxes[:, :-count]) for s in stages)
        return (*groups, StageGroup("denoising", noisy, known_pairs=denoising.pairs))

    def _propose(self, tokens: Tensor, grid: TokenGrid) -> StagePrediction:
        """The best proposals, best first: query k starts from the k-th."""
        features, anchors, proposes = self.proposal_features(tokens, grid)
        logits = self.classify_proposals(features)
        best = best_tokens(logits.amax(-1), proposes, self.content.num_embeddings)
        steps = self.refine_proposals(take_tokens(features, best))
        boxes = take_tokens(anchors, best) + steps.to(anchors.dtype)
        return StagePrediction(take_tokens(logits, best), boxes.sigmoid())

    def _decode(
        self,
        queries: Tensor,
        references: Tensor,
        memory: tuple[Tensor, TokenGrid],
        blocked: Tensor | None,
    ) -> list[StagePrediction]:
        stages: list[StagePrediction] = []
        # the same boxes with the gradient of the stage before: a stage's loss looks forward twice
        supervised = references
        for index, layer in enumerate(self.layers):
            # y before x; as seen from the finest padded level, like the released code
            seen = memory[1].in_levels(references)[:, :, 0, [1, 0, 2, 3]]
            code = box_code(seen, queries.shape[-1])
            position = self.reference_code(code.to(queries.dtype))
            queries = layer(queries, position, references, memory, blocked)
            hidden = self.norm(queries)
            boxes = move_boxes(self.refine(hidden), supervised, _EPSILON)
            stages.append(StagePrediction(self.classify(hidden), boxes))
            if index < len(self.layers) - 1:
                # what the next stage starts from comes from the queries before their norm
                supervised = move_boxes(self.refine(queries), references, _EPSILON)
                references = supervised.detach()
        return stages


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
