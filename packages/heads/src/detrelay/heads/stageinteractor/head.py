"""StageInteractor: a cascade of decoder stages that pass filters on to later ones.

Reference:
    Teng et al., StageInteractor: Query-based Object Detector with Cross-stage Interaction, ICCV
    2023 (arXiv 2304.04978). Checked against the released code, MCG-NJU/StageInteractor
    (Apache-2.0); where paper and code differ, this follows the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.detector.pyramid import ChannelMapper
from detrelay.core.losses import CLASS_PRIOR_BIAS, LossConfig
from detrelay.core.ops.numbers import filled
from detrelay.core.ops.point_sampling import channels_last_maps, sample_maps
from detrelay.core.structures import FeaturePyramid, StageGroup, StagePrediction, Targets
from detrelay.heads.query_sets import DECODER, RECOLLECTED
from detrelay.heads.stageinteractor.attention import OverlapBiasedAttention
from detrelay.heads.stageinteractor.config import StageInteractorConfig
from detrelay.heads.stageinteractor.geometry import grid_boxes, position_code, sizes_of
from detrelay.heads.stageinteractor.mixing import DynamicMixing, FilterBank
from detrelay.heads.stageinteractor.sampling import PointGenerator

# log2 of pixels; from the released sampler, where new points have z = 0
_FINEST_SCALE = 3.0


@dataclass(frozen=True, slots=True)
class StageState:
    """What one stage passes to the next.

    Attributes:
        queries: [B, Q, C].
        boxes: [B, Q, 4], x, y, log2 sqrt(w h), log2(h / w); pixels, at least float32.
        bank: the filters of earlier stages.
    """

    queries: Tensor
    boxes: Tensor
    bank: FilterBank


class Branch(nn.Module):
    """A prediction branch: one hidden layer with LayerNorm and ReLU, then a linear."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, out_dim)

    def forward(self, queries: Tensor) -> Tensor:
        """[..., dim] -> [..., out_dim]."""
        hidden = self.norm(self.hidden(queries)).relu_()
        return self.out(hidden)


class StageInteractorStage(nn.Module):
    """One decoder stage: attend, sample, mix, and predict a better box and class scores."""

    def __init__(self, config: StageInteractorConfig, stage: int) -> None:
        super().__init__()
        dim, shape = config.d_model, config.mixing_shape(stage)
        # the bank starts at stage 1: stage 0 samples a different number of points
        self.feeds_bank = stage > 0
        self.finest_scale = config.finest_scale
        self.center_unit = config.center_unit
        self.attention = OverlapBiasedAttention(config)
        self.attention_norm = nn.LayerNorm(dim)
        self.points = PointGenerator(
            dim,
            shape.groups,
            shape.base_points,
            shape.pattern,
            config.two_step_sampling,
            # new points read the same levels regardless of where the finest one is set
            start_scale=config.finest_scale - _FINEST_SCALE,
        )
        self.mixing = DynamicMixing(shape)
        self.ffn_in = nn.Linear(dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)
        self.classify = Branch(dim, config.num_labels or 0)
        self.refine = Branch(dim, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linears, class scores at their prior, boxes left where they are."""
        hidden = (self.ffn_in, self.ffn_out, self.classify.hidden, self.refine.hidden)
        for module in (*hidden, self.classify.out):
            nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(self.classify.out.bias, CLASS_PRIOR_BIAS)
        nn.init.zeros_(self.refine.out.weight)
        nn.init.zeros_(self.refine.out.bias)

    def forward(
        self, state: StageState, maps: tuple[Tensor, ...], scene: _Scene
    ) -> tuple[StagePrediction, StageState]:
        """Refine every query once.

        Args:
            state: from the stage before; its boxes carry no gradient.
            maps: L tensors [B, H, W, G, D].
            scene: sizes of levels and images.

        Returns:
            What this stage predicts, and the state for the next one.
        """
        boxes = state.boxes
        code = position_code(boxes, state.queries.shape[-1]).to(state.queries.dtype)
        queries = state.queries + code
        queries = self.attention_norm(queries + self.attention(queries, boxes))
        sampled = self._sample(queries, boxes, maps, scene)
        mixed, bank = self.mixing(sampled.flatten(0, 1), queries.flatten(0, 1), state.bank)
        queries = mixed.view_as(queries)
        hidden = self.ffn_in(queries).relu_()
        queries = self.ffn_norm(queries + self.ffn_out(hidden))
        step = self.refine(queries).to(boxes.dtype)
        unit = sizes_of(boxes) if self.center_unit == "size" else 2 ** boxes[..., 2:3]
        boxes = torch.cat(
            [boxes[..., :2] + step[..., :2] * unit, boxes[..., 2:] + step[..., 2:]], -1
        )
        prediction = StagePrediction(
            logits=self.classify(queries),
            boxes=scene.in_units_of_image(boxes),
            references=scene.in_units_of_image(state.boxes) if self.training else None,
        )
        bank = bank if self.feeds_bank else state.bank
        return prediction, StageState(queries, boxes.detach(), bank)

    def _sample(
        self,
        queries: Tensor,
        boxes: Tensor,
        maps: tuple[Tensor, ...],
        scene: _Scene,
    ) -> Tensor:
        """Features at the points of every query, [B, Q, G, N, D]; each point reads all levels."""
        positions, scale = self.points(queries, boxes)
        level = torch.arange(len(maps), device=scale.device, dtype=scale.dtype)
        level = level[:, None, None, None, None]
        weights = (-0.5 * (scale - self.finest_scale - level) ** 2).softmax(dim=0)
        locations = positions[:, None] / scene.level_sizes.t()[..., None, None, None, None]
        return sample_maps(maps, locations, weights)


@dataclass(frozen=True, slots=True)
class _Scene:
    """Sizes in pixels.

    Attributes:
        image_whwh: [B, 1, 4], width, height, width, height of the unpadded images.
        level_sizes: [L, 2], width and height that the padded levels span.
    """

    image_whwh: Tensor
    level_sizes: Tensor

    def in_units_of_image(self, boxes: Tensor) -> Tensor:
        """The decoder's boxes [B, Q, 4] as cxcywh in [0, 1]."""
        return torch.cat([boxes[..., :2], sizes_of(boxes)], dim=-1) / self.image_whwh


class StageInteractorHead(nn.Module):
    """The decoder: queries that start at the whole image or in a grid, refined by S stages."""

    def __init__(self, config: StageInteractorConfig) -> None:
        super().__init__()
        self.num_groups = config.num_groups
        self.initial_boxes = config.initial_boxes
        self.hidden_sets = tuple(config.hidden_sets)
        self.recollect_queries = config.recollect_queries
        self.content = nn.Embedding(config.num_queries, config.d_model)
        self.set_content = nn.ModuleList(
            nn.Embedding(count, config.d_model) for count in config.hidden_sets.values()
        )
        self.stages = nn.ModuleList(
            StageInteractorStage(config, stage) for stage in range(config.num_stages)
        )

    def forward(
        self, pyramid: FeaturePyramid, targets: Targets | None = None
    ) -> tuple[StageGroup, ...]:
        """Run all stages.

        Args:
            pyramid: L levels [B, C, H, W] of any number, finest first.
            targets: unused; the signature is that of heads that denoise.

        Returns:
            Group "decoder", S stages of logits [B, Q, K] and boxes [B, Q, 4]; in training those of
            the other query sets.
        """
        maps = channels_last_maps(pyramid.levels, self.num_groups)
        scene = self._scene(pyramid)
        own, states = self._run(self.content, maps, scene)
        groups = [StageGroup(DECODER, own)]
        if self.training:
            for name, content in zip(self.hidden_sets, self.set_content, strict=True):
                groups.append(StageGroup(name, self._run(content, maps, scene)[0]))
            if self.recollect_queries:
                again = self._recollect(states, maps, scene)
                groups.append(StageGroup(RECOLLECTED, again, slots=DECODER))
        return tuple(groups)

    def _run(
        self, content: nn.Module, maps: tuple[Tensor, ...], scene: _Scene
    ) -> tuple[tuple[StagePrediction, ...], list[StageState]]:
        """Refine one query set; its predictions, and its states before the first stage and after.

        Sets run one after the other, so they neither see each other nor share a filter bank.
        """
        states = [self._start(content.get_parameter("weight"), scene)]
        predictions = []
        for stage in self.stages:
            prediction, state = stage(states[-1], maps, scene)
            predictions.append(prediction)
            states.append(state)
        return tuple(predictions), states

    def _recollect(
        self, states: Sequence[StageState], maps: tuple[Tensor, ...], scene: _Scene
    ) -> tuple[StagePrediction, ...]:
        """Queries that skipped a stage, refined by all later ones: 1, 2, 4, 7, 12 more sets.

        Reference:
            Chen et al. (SQR), CVPR 2023.
        """
        predictions: list[StagePrediction] = []
        refined: list[StageState] = []  # the recollected sets after the stage before
        skipping: list[StageState] = []  # those after the stage before that one
        for before, stage in zip(states, list(self.stages)[1:], strict=False):
            results = [stage(state, maps, scene) for state in (*refined, before, *skipping)]
            predictions += [prediction for prediction, _ in results]
            skipping, refined = refined, [state for _, state in results]
        return tuple(predictions)

    def _scene(self, pyramid: FeaturePyramid) -> _Scene:
        dtype = torch.promote_types(pyramid.levels[0].dtype, torch.float32)
        whwh = pyramid.image_sizes.flip(-1).repeat(1, 2).to(dtype)
        level_sizes = [
            (level.shape[-1] * stride, level.shape[-2] * stride)
            for level, stride in zip(pyramid.levels, pyramid.strides, strict=True)
        ]
        return _Scene(whwh[:, None], filled(level_sizes, whwh))

    def _start(self, content: Tensor, scene: _Scene) -> StageState:
        """Every query starts with its content [Q, C] and its initial box."""
        whwh = scene.image_whwh
        content = F.layer_norm(content, content.shape[-1:])
        batch = whwh.shape[0]
        on_grid = self.initial_boxes == "grid"
        start = grid_boxes(len(content), whwh) if on_grid else filled([[0.5, 0.5, 1, 1]], whwh)
        center, width, height = (start * whwh).split([2, 1, 1], dim=-1)
        scale = 0.5 * (width * height).log2()
        boxes = torch.cat([center, scale, (height / width).log2()], dim=-1)
        return StageState(
            queries=content.expand(batch, -1, -1),
            boxes=boxes.expand(-1, len(content), -1),
            bank=FilterBank(),
        )


class StageInteractorForObjectDetection(DetectorForObjectDetection):
    """StageInteractor with a shared-norm channel mapper.

    Reference:
        Teng et al., ICCV 2023; loss numbers of the released configs: focal 2, L1 on corners 5,
        GIoU 2.
    """

    config: StageInteractorConfig
    config_class = StageInteractorConfig
    loss_config: ClassVar[LossConfig] = LossConfig(l1_format="xyxy")
    assigner: ClassVar[str] = "cross_stage"
    _no_split_modules = ["StageInteractorStage"]  # noqa: RUF012 - the base declares it so

    def __init__(self, config: StageInteractorConfig) -> None:
        super().__init__(config)
        self.backbone = self.build_backbone(config.num_levels)
        self.neck = ChannelMapper(self.backbone.channels, config.d_model)
        self.head = StageInteractorHead(config)
        self.post_init()
