"""DN-DETR: denoising on Deformable DETR, with queries that start from learned anchor boxes.

Reference:
    Li et al., DN-DETR: Accelerate DETR Training by Introducing Query DeNoising, CVPR 2022 (arXiv
    2203.01305), its deformable variant; anchors as queries are those of Liu et al., DAB-DETR, ICLR
    2022. Written from the papers: no released weights or numbers are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

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
    at_least_float32,
    box_code,
    move_boxes,
    reset_box_head,
    reset_class_head,
    xavier_linears,
)

_GRID_TEMPERATURE = 10000.0
_GRID_OFFSET = -0.5
# keeps boxes away from 0 and 1 where their logit is taken
_EPSILON = 1e-5
# a class score that costs nothing where nothing is wanted
_CERTAINLY_NOT = -1e4


@strict
class DnDetrConfig(DenoisingConfig):
    """Configuration of DN-DETR with a deformable encoder and decoder.

    Reference:
        Li et al., CVPR 2022: five groups, a fifth of the labels flipped, box noise 0.4.
    """

    model_type = "detrelay_dn_detr"

    denoising_groups: int | None = 5
    label_flip_chance: float | int = 0.2
    box_noise_scale: float | int = 0.4


class DnDetrHead(nn.Module):
    """Encoder, anchors, denoising queries and the decoder's stages."""

    def __init__(self, config: DnDetrConfig) -> None:
        super().__init__()
        dim, classes = config.d_model, config.num_labels or 0
        self.encoder = DeformableEncoder(config, _GRID_TEMPERATURE, _GRID_OFFSET)
        self.anchors = nn.Embedding(config.num_queries, 4)
        # the last channel tells denoising queries (1) from the others (0)
        self.content = nn.Embedding(config.num_queries, dim - 1)
        self.denoising = (
            None
            if config.denoising_groups == 0
            else Denoising(config, label_dim=dim - 1, contrastive=False, epsilon=_EPSILON)
        )
        self.reference_code = Mlp(2 * dim, dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.classify = nn.ModuleList(nn.Linear(dim, classes) for _ in self.layers)
        self.refine = nn.ModuleList(Mlp(dim, dim, dim, 4) for _ in self.layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Class scores start at their prior, boxes at their anchors."""
        for layer in self.reference_code.layers:
            assert isinstance(layer, nn.Linear)
            xavier_linears(layer)
        for head in self.classify:
            reset_class_head(head)
        for head in self.refine:
            reset_box_head(head)

    def forward(
        self, pyramid: FeaturePyramid, targets: Targets | None = None
    ) -> tuple[StageGroup, ...]:
        """Run encoder and decoder.

        Args:
            pyramid: L levels [B, C, H, W], finest first.
            targets: objects to denoise in training.

        Returns:
            Group "decoder", S stages of logits [B, Q, K] and boxes [B, Q, 4]; in training
            "denoising", S stages [B, P, ...], where P is 0 if the batch has no objects.
        """
        memory = self.encoder(pyramid)
        batch, count = len(pyramid.image_sizes), self.content.num_embeddings
        queries = F.pad(self.content.weight, (0, 1)).expand(batch, -1, -1)
        references = at_least_float32(self.anchors.weight).sigmoid().expand(batch, -1, -1)
        denoising: DenoisingQueries | None = None
        if self.denoising is not None and self.training:
            if targets is None:
                targets = no_targets(batch, references)
            denoising = self.denoising(targets, count)
            queries = torch.cat([denoising.content.to(queries.dtype), queries], dim=1)
            references = torch.cat([denoising.references.to(references.dtype), references], dim=1)
        stages = []
        for layer, classify, refine in zip(self.layers, self.classify, self.refine, strict=True):
            code = box_code(references, queries.shape[-1]).to(queries.dtype)
            queries = layer(
                queries,
                self.reference_code(code),
                references,
                memory,
                None if denoising is None else denoising.blocked,
            )
            boxes = move_boxes(refine(queries), references, _EPSILON)
            stages.append(StagePrediction(classify(queries), boxes))
            references = boxes.detach()
        own = tuple(StagePrediction(s.logits[:, -count:], s.boxes[:, -count:]) for s in stages)
        groups = (StageGroup("decoder", own),)
        if denoising is None:
            return groups
        noisy = tuple(_denoised(stage, denoising.used) for stage in stages)
        return (*groups, StageGroup("denoising", noisy, known_pairs=denoising.pairs))


def _denoised(stage: StagePrediction, used: Tensor) -> StagePrediction:
    """The denoising queries of a stage; unused ones say "nothing" and so cost nothing."""
    count = used.shape[1]
    logits = stage.logits[:, :count].masked_fill(~used[..., None], _CERTAINLY_NOT)
    return replace(stage, logits=logits, boxes=stage.boxes[:, :count])


class DnDetrForObjectDetection(DeformableForObjectDetection):
    """DN-DETR; losses are those of Deformable DETR."""

    config: DnDetrConfig
    config_class = DnDetrConfig
    loss_config: ClassVar[LossConfig] = LossConfig(log_epsilon=1e-8)

    def __init__(self, config: DnDetrConfig) -> None:
        super().__init__(config)
        self.head = DnDetrHead(config)
        self.post_init()
