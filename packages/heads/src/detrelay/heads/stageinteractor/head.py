"""StageInteractor: a cascade of decoder stages that hand filters on to each other.

Reference:
    Teng et al., StageInteractor: Query-based Object Detector with Cross-stage Interaction, ICCV
    2023 (arXiv 2304.04978). Checked against the released code, MCG-NJU/StageInteractor
    (Apache-2.0); where paper and code differ the code is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from detrelay.core.boxes import area, cxcywh_to_xyxy, intersection
from detrelay.core.detector.config import DetectorConfig, require_positive
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.detector.pyramid import ChannelMapper
from detrelay.core.losses import LossConfig
from detrelay.core.ops.point_sampling import channels_last_maps, sample_maps
from detrelay.core.structures import FeaturePyramid, StageGroup, StagePrediction, Targets
from detrelay.heads.stageinteractor.mixing import (
    DynamicMixing,
    FilterBank,
    MixingShape,
    PointGenerator,
    empty_banks,
)

# what makes the decoder compute what AdaMixer's does
ADAMIXER: Mapping[str, Any] = MappingProxyType(
    {
        "max_reused_filters": 0,
        "reuse_spatial_filters": False,
        "two_step_sampling": False,
        "finest_scale": 2.0,
        "center_unit": "scale",
    }
)
# log2 of pixels; of the released sampler, where new points have z = 0
_FINEST_SCALE = 3.0
_POSITION_TEMPERATURE = 10000.0
_POSITION_UNIT_PX = 1000.0
# prior probability of an object in a class at initialisation (Lin et al., ICCV 2017)
_CLASS_PRIOR_BIAS = -4.59511985013459


@strict
class StageInteractorConfig(DetectorConfig):
    """Configuration of StageInteractor; the defaults are the published ResNet-50 1x model.

    Attributes:
        num_queries: N; 100 (300 in the longer recipes).
        d_model: C, width of queries and feature maps.
        num_levels: L, feature maps that are read, strides 4, 8, 16, 32; with fewer than four the
            backbone ends with the last of them.
        num_groups: G, groups of channels that sample and mix on their own.
        num_attention_heads: heads of self-attention.
        num_stages: S, decoder stages; weights are not shared.
        pattern_size: K, points of the inner pattern around each base point.
        num_base_points: P, base points a group from the second stage on.
        num_base_points_first: the same in the first stage, whose filters are never reused.
        num_out_points: O, output patterns of spatial mixing.
        ffn_dim: hidden width of the feed-forward network.
        max_reused_filters: how many channel filters of earlier stages a stage applies again at
            most, newest kept; None for all, 0 for none.
        reuse_spatial_filters: whether half of the spatial filters are blended with the ones of the
            stage before. With `max_reused_filters` 0 and this off the detector is the baseline of
            the paper's table 6, close to an AdaMixer; `ADAMIXER` makes it one.
        adapter: how own-mixed features enter a reused filter: "full" as released, "channel" or
            "none" for the ablations, see `StaticAdapter`.
        two_step_sampling: base points with an inner pattern; False predicts all points at once.
        finest_scale: log2 of the pixels at which a point reads most of the finest level; that of
            each coarser level is one more. 3 as released, 2 in AdaMixer.
        center_unit: what steps of the centre are multiples of: "size", width and height of the box,
            as released, or "scale", sqrt(width * height) for both, as in AdaMixer.

    Reference:
        Teng et al., ICCV 2023; released config `stageinteractor_r50_1x_coco`. Gao et al.
        (AdaMixer), CVPR 2022; released config `adamixer_r50_1x_coco`.
    """

    model_type = "detrelay_stageinteractor"

    num_queries: int = 100
    d_model: int = 256
    num_levels: int = 4
    num_groups: int = 4
    num_attention_heads: int = 8
    num_stages: int = 6
    pattern_size: int = 8
    num_base_points: int = 4
    num_base_points_first: int = 8
    num_out_points: int = 128
    ffn_dim: int = 2048
    max_reused_filters: int | None = None
    reuse_spatial_filters: bool = True
    adapter: Literal["full", "channel", "none"] = "full"
    two_step_sampling: bool = True
    finest_scale: float | int = 3.0
    center_unit: Literal["size", "scale"] = "size"

    def validate_architecture(self) -> None:
        """Refuse sizes that do not divide each other."""
        super().validate_architecture()
        require_positive(
            self,
            *("num_queries", "num_groups", "num_attention_heads", "num_stages", "pattern_size"),
            *("num_base_points", "num_base_points_first", "num_out_points", "ffn_dim"),
        )
        if not 1 <= self.num_levels <= 4:
            raise ValueError(f"num_levels must lie in 1..4; found {self.num_levels}")
        for name in ("num_groups", "num_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(
                    f"d_model ({self.d_model}) must be a multiple of {name} ({getattr(self, name)})"
                )
        if self.d_model % 32:
            raise ValueError(f"d_model must be a multiple of 32; found {self.d_model}")
        if self.reuse_spatial_filters and self.num_out_points % 2:
            raise ValueError(
                f"num_out_points must be even to reuse spatial filters; found {self.num_out_points}"
            )
        if self.max_reused_filters is not None and self.max_reused_filters < 0:
            raise ValueError(f"max_reused_filters must be >= 0; found {self.max_reused_filters}")

    def mixing_shape(self, stage: int) -> MixingShape:
        """Sizes of one stage's mixing; the bank of stage s holds the filters of stages 1..s-1."""
        available = max(0, stage - 1)
        limit = self.max_reused_filters
        return MixingShape(
            dim=self.d_model,
            groups=self.num_groups,
            base_points=self.num_base_points if stage else self.num_base_points_first,
            pattern=self.pattern_size,
            out_points=self.num_out_points,
            reused=available if limit is None else min(available, limit),
            reuse_spatial=self.reuse_spatial_filters and available > 0,
            adapter=self.adapter,
            has_bias=limit != 0,
        )


@dataclass(frozen=True, slots=True)
class StageState:
    """What one stage hands to the next.

    Attributes:
        queries: [B, Q, C].
        boxes: [B, Q, 4], x, y, log2 sqrt(w h), log2(h / w); pixels, at least float32.
        banks: the filters of earlier stages, one bank for each block of groups that is mixed
            at a time.
    """

    queries: Tensor
    boxes: Tensor
    banks: tuple[FilterBank, ...]


def sizes_of(boxes: Tensor) -> Tensor:
    """Width and height [..., 2] in pixels of boxes (x, y, log2 scale, log2 ratio) [..., 4]."""
    scale, ratio = boxes[..., 2:3], boxes[..., 3:4]
    return torch.cat([2 ** (scale - 0.5 * ratio), 2 ** (scale + 0.5 * ratio)], dim=-1)


def position_code(boxes: Tensor, dim: int) -> Tensor:
    """Sine and cosine code [..., dim] of boxes (x, y, log2 scale, log2 ratio) [..., 4]."""
    width = dim // 4
    unit = boxes.new_tensor([_POSITION_UNIT_PX, _POSITION_UNIT_PX, 1, 1])
    # float32 even for float64 boxes, as in the released code
    exponent = 2 * torch.arange(width // 2, dtype=torch.float32, device=boxes.device) / width
    angle = (boxes / unit)[..., None] / (_POSITION_TEMPERATURE**exponent).to(boxes.dtype)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


class OverlapBiasedAttention(nn.Module):
    """Self-attention among queries, biased towards queries whose box covers one's own.

    Adds tau_h * ln(intersection / own area + 1e-7) to the logits of head h.

    Reference:
        Gao et al. (AdaMixer), CVPR 2022, section 3.3.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.overlap_scale = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections (the packed one as a whole), scales uniform in [0, 4]."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        nn.init.uniform_(self.overlap_scale, 0, 4)

    def forward(self, queries: Tensor, boxes: Tensor) -> Tensor:
        """Attend: queries [B, Q, C], boxes [B, Q, 4] (see `StageState`) -> [B, Q, C]."""
        packed = F.linear(queries, self.in_proj_weight, self.in_proj_bias)
        heads = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)  # [B, heads, Q, C / heads]
        bias = self.overlap_scale.view(-1, 1, 1) * _log_coverage(boxes)[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.out_proj(attended.transpose(1, 2).flatten(2))


def _log_coverage(boxes: Tensor) -> Tensor:
    """Ln of the share of box i that box j covers: [B, Q, 4] -> [B, Q, Q]."""
    corners = cxcywh_to_xyxy(torch.cat([boxes[..., :2], sizes_of(boxes)], dim=-1))
    covered = intersection(corners[:, :, None], corners[:, None])
    return (covered / area(corners).clamp(min=1e-6)[..., None] + 1e-7).log()


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
        # the bank starts at stage 1: stage 0 samples another number of points
        self.feeds_bank = stage > 0
        self.finest_scale = config.finest_scale
        self.center_unit = config.center_unit
        self.attention = OverlapBiasedAttention(dim, config.num_attention_heads)
        self.attention_norm = nn.LayerNorm(dim)
        self.points = PointGenerator(
            dim,
            shape.groups,
            shape.base_points,
            shape.pattern,
            config.two_step_sampling,
            # new points read the same levels wherever the finest one is set
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
        nn.init.constant_(self.classify.out.bias, _CLASS_PRIOR_BIAS)
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
        mixed, banks = self.mixing(sampled.flatten(0, 1), queries.flatten(0, 1), state.banks)
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
            boxes=torch.cat([boxes[..., :2], sizes_of(boxes)], dim=-1) / scene.image_whwh,
        )
        banks = banks if self.feeds_bank else state.banks
        return prediction, StageState(queries, boxes.detach(), banks)

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


class StageInteractorHead(nn.Module):
    """The decoder: queries that start as the whole image and are refined by S stages."""

    def __init__(self, config: StageInteractorConfig) -> None:
        super().__init__()
        self.num_groups = config.num_groups
        self.content = nn.Embedding(config.num_queries, config.d_model)
        self.stages = nn.ModuleList(
            StageInteractorStage(config, stage) for stage in range(config.num_stages)
        )

    def forward(
        self, pyramid: FeaturePyramid, targets: Targets | None = None
    ) -> tuple[StageGroup, ...]:
        """Run all stages.

        Args:
            pyramid: L levels [B, C, H, W] of any number, finest first.
            targets: not used; the same call serves heads that denoise.

        Returns:
            One group, "decoder", with S stages of logits [B, Q, K] and boxes [B, Q, 4].
        """
        maps = channels_last_maps(pyramid.levels, self.num_groups)
        scene = self._scene(pyramid)
        state = self._start(pyramid, scene)
        predictions = []
        for stage in self.stages:
            prediction, state = stage(state, maps, scene)
            predictions.append(prediction)
        return (StageGroup("decoder", tuple(predictions)),)

    def _scene(self, pyramid: FeaturePyramid) -> _Scene:
        dtype = torch.promote_types(pyramid.levels[0].dtype, torch.float32)
        whwh = pyramid.image_sizes.flip(-1).repeat(1, 2).to(dtype)
        level_sizes = [
            (level.shape[-1] * stride, level.shape[-2] * stride)
            for level, stride in zip(pyramid.levels, pyramid.strides, strict=True)
        ]
        return _Scene(whwh[:, None], whwh.new_tensor(level_sizes))

    def _start(self, pyramid: FeaturePyramid, scene: _Scene) -> StageState:
        """Every query starts with its own content and the whole unpadded image as its box."""
        whwh = scene.image_whwh
        count = self.content.num_embeddings
        content = F.layer_norm(self.content.weight, (self.content.embedding_dim,))
        width, height = whwh[..., 0:1], whwh[..., 1:2]
        scale = 0.5 * (width * height).log2()
        boxes = torch.cat([0.5 * whwh[..., :2], scale, (height / width).log2()], dim=-1)
        batch = whwh.shape[0]
        return StageState(
            queries=content.expand(batch, -1, -1),
            boxes=boxes.expand(-1, count, -1),
            banks=empty_banks(batch * count, self.num_groups, whwh.device),
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
    _no_split_modules = ["StageInteractorStage"]  # noqa: RUF012 - the base declares it so

    def __init__(self, config: StageInteractorConfig) -> None:
        super().__init__(config)
        self.backbone = self.build_backbone(config.num_levels)
        self.neck = ChannelMapper(self.backbone.channels, config.d_model)
        self.head = StageInteractorHead(config)
        self.post_init()
