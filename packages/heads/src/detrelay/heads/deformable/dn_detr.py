"""DN-DETR: denoising on Deformable DETR, with queries that start from learned anchor boxes.

Reference:
    Li et al., DN-DETR: Accelerate DETR Training by Introducing Query DeNoising, CVPR 2022 (arXiv
    2203.01305), its deformable variant; anchors as queries are those of Liu et al., DAB-DETR, ICLR
    2022. Written from the papers; not compared with released weights or numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from detrelay.core.losses import LossConfig
from detrelay.core.structures import (
    FeaturePyramid,
    GroupFacts,
    StageGroup,
    StagePrediction,
    Targets,
    at_least_float32,
)
from detrelay.heads.deformable.denoising import Denoising, DenoisingConfig, no_targets
from detrelay.heads.deformable.layers import (
    DeformableEncoder,
    DeformableForObjectDetection,
    Mlp,
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
from detrelay.heads.query_sets import DECODER

_GRID_TEMPERATURE = 10000.0
_GRID_OFFSET = -0.5
# keeps boxes away from 0 and 1 where their logit is taken
_EPSILON = 1e-5
# a class logit whose loss is zero where there is no target
_BACKGROUND_LOGIT = -1e4


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

    def stage_groups(self) -> tuple[GroupFacts, ...]:
        """The decoder, other passes and denoising."""
        return (
            GroupFacts(DECODER, references=True),
            *(replace(group, references=True) for group in self.pass_groups),
            *self.denoising_group(),
        )


class DnDetrHead(DecoderHead):
    """Encoder, anchors, denoising queries and the decoder's stages."""

    def __init__(self, config: DnDetrConfig) -> None:
        super().__init__(config)
        dim, classes = config.d_model, config.num_labels or 0
        hidden = config.hidden_sets.values()
        self.encoder = DeformableEncoder(config, _GRID_TEMPERATURE, _GRID_OFFSET)
        self.anchors = nn.Embedding(config.num_queries, 4)
        # the last channel tells denoising queries (1) from the others (0)
        self.content = nn.Embedding(config.num_queries, dim - 1)
        self.set_anchors = nn.ModuleList(nn.Embedding(count, 4) for count in hidden)
        self.set_content = nn.ModuleList(nn.Embedding(count, dim - 1) for count in hidden)
        self.denoising = (
            None
            if config.denoising_groups == 0
            else Denoising(config, label_dim=dim - 1, contrastive=False, epsilon=_EPSILON)
        )
        self.reference_code = Mlp(2 * dim, dim, dim)
        self.layers = decoder_layers(config)
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
            "denoising", S stages [B, P, ...], where P is 0 if the batch has no objects, and those
            of the other passes.
        """
        memory = self.encoder(pyramid)
        batch = pyramid.image_sizes.shape[0]
        sets = [QuerySet(DECODER, self._start(self.anchors, self.content, batch))]
        if not self.training:
            return self.decode(sets, memory)
        parts = zip(self.hidden_sets, self.set_anchors, self.set_content, strict=True)
        sets += [
            QuerySet(name, self._start(anchors, content, batch)) for name, anchors, content in parts
        ]
        if self.denoising is None:
            return self.decode(sets, memory)
        if targets is None:
            targets = no_targets(batch, sets[0].start.references)
        denoising = self.denoising(targets, len(sets[0]))
        groups = self.decode([denoising.query_set(), *sets], memory)
        return tuple(
            replace(group, stages=tuple(_silence(stage, denoising.used) for stage in group.stages))
            if group.name == "denoising"
            else group
            for group in groups
        )

    def _start(self, anchors: nn.Module, content: nn.Module, batch: int) -> DecoderState:
        queries = F.pad(content.get_parameter("weight"), (0, 1)).expand(batch, -1, -1)
        references = at_least_float32(anchors.get_parameter("weight")).sigmoid()
        return DecoderState(queries, references.expand(batch, -1, -1))

    def place(self, state: DecoderState, memory: Memory) -> Tensor:
        """Code of the boxes."""
        code = box_code(state.references, state.queries.shape[-1])
        return self.reference_code(code.to(state.queries.dtype))

    def predict(
        self, index: int, queries: Tensor, state: DecoderState
    ) -> tuple[StagePrediction, DecoderState]:
        """Scores and boxes; the next stage starts from these boxes."""
        boxes = move_boxes(self.refine[index](queries), state.references, _EPSILON)
        prediction = StagePrediction(self.classify[index](queries), boxes, state.references)
        return prediction, DecoderState(queries, boxes.detach())


def _silence(stage: StagePrediction, used: Tensor) -> StagePrediction:
    """Make unused denoising queries predict background, at zero loss."""
    return replace(stage, logits=stage.logits.masked_fill(~used[..., None], _BACKGROUND_LOGIT))


class DnDetrForObjectDetection(DeformableForObjectDetection):
    """DN-DETR; losses are those of Deformable DETR."""

    config: DnDetrConfig
    config_class = DnDetrConfig
    loss_config: ClassVar[LossConfig] = LossConfig(log_epsilon=1e-8)

    def __init__(self, config: DnDetrConfig) -> None:
        super().__init__(config)
        self.head = DnDetrHead(config)
        self.post_init()
