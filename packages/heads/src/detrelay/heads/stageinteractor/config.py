"""Configuration of StageInteractor, and the sizes of each stage's mixing that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from detrelay.core.detector.config import require_positive
from detrelay.core.structures import GroupFacts
from detrelay.heads.query_sets import DECODER, QuerySetsConfig

Adapter = Literal["full", "channel", "none"]
# settings with which the decoder is AdaMixer's
ADAMIXER: Mapping[str, Any] = MappingProxyType(
    {
        "max_reused_filters": 0,
        "reuse_spatial_filters": False,
        "two_step_sampling": False,
        "finest_scale": 2.0,
        "center_unit": "scale",
    }
)


@dataclass(frozen=True, slots=True)
class MixingShape:
    """Sizes of one stage's mixing.

    Attributes:
        dim: C, width of queries and feature maps.
        groups: G.
        base_points: P.
        pattern: K.
        out_points: O.
        reused: J, number of channel filters of the bank that are reused.
        reuse_filters: whether the reused channel filters are multiplied with the features; if not,
            only their adapters are applied.
        reuse_spatial: whether half of the spatial filters are blended with the newest of the bank.
        adapter: what passes own-mixed features on to a reused filter.
        has_bias: whether channel and spatial mixing add dynamic biases.
    """

    dim: int
    groups: int
    base_points: int
    pattern: int
    out_points: int
    reused: int
    reuse_filters: bool
    reuse_spatial: bool
    adapter: Adapter
    has_bias: bool

    @property
    def width(self) -> int:
        """D, channels per group."""
        return self.dim // self.groups

    @property
    def points(self) -> int:
        """N, sampled points per group."""
        return self.base_points * self.pattern

    @property
    def own_patterns(self) -> int:
        """Number of spatial filters that the stage generates itself."""
        return self.out_points // 2 if self.reuse_spatial else self.out_points


@strict
class StageInteractorConfig(QuerySetsConfig):
    """Configuration of StageInteractor; the defaults are the published ResNet-50 1x model.

    Attributes:
        num_queries: N; 100 (300 in the longer recipes).
        initial_boxes: where queries start: "image", all at the whole image, as released; or "grid",
            side by side in rows, each two cells wide and high, which learns sooner.
        d_model: C, width of queries and feature maps.
        num_levels: L, feature maps used, strides 4, 8, 16, 32; with fewer than four the backbone
            ends with the last of them.
        num_groups: G, groups of channels that sample and mix on their own.
        num_attention_heads: heads of self-attention.
        num_stages: S, decoder stages; weights are not shared.
        pattern_size: K, points of the inner pattern around each base point.
        num_base_points: P, base points per group from the second stage on.
        num_base_points_first: the same in the first stage, whose filters are never reused.
        num_out_points: O, output patterns of spatial mixing.
        ffn_dim: hidden width of the feed-forward network.
        max_reused_filters: maximum number of channel filters of earlier stages that a stage reuses,
            newest kept; None for all, 0 for none.
        apply_reused_filters: whether these are multiplied with the features. If not, each is
            replaced by its static adapters alone, without gates and biases: static mixing, the
            released code's `no_previous_filters`.
        reuse_spatial_filters: whether half of the spatial filters are blended with the ones of the
            stage before. With `max_reused_filters` 0 and this off the detector is the baseline of
            the paper's table 6, close to AdaMixer; `ADAMIXER` makes it exactly that.
        adapter: how own-mixed features enter a reused filter: "full" as released, "channel" or
            "none" for the ablations, see `StaticAdapter`.
        two_step_sampling: base points with an inner pattern; False predicts all points at once.
        finest_scale: log2 of the pixels at which a point reads most of the finest level; that of
            each coarser level is one more. 3 as released, 2 in AdaMixer.
        center_unit: unit of the centre's steps: "size", width and height of the box,
            as released, or "scale", sqrt(width * height) for both, as in AdaMixer.

    Reference:
        Teng et al., ICCV 2023; released config `stageinteractor_r50_1x_coco`. Gao et al.
        (AdaMixer), CVPR 2022; released config `adamixer_r50_1x_coco`.
    """

    model_type = "detrelay_stageinteractor"

    num_queries: int = 100
    initial_boxes: Literal["image", "grid"] = "image"
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
    apply_reused_filters: bool = True
    reuse_spatial_filters: bool = True
    adapter: Literal["full", "channel", "none"] = "full"
    two_step_sampling: bool = True
    finest_scale: float | int = 3.0
    center_unit: Literal["size", "scale"] = "size"

    def validate_architecture(self) -> None:
        """Reject sizes that do not divide each other."""
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
        if self.recollect_queries and (self.max_reused_filters != 0 or self.reuse_spatial_filters):
            raise ValueError(
                "recollect_queries: a query that skipped a stage has no filters from it to reuse; "
                "set max_reused_filters to 0 and reuse_spatial_filters to false"
            )

    def stage_groups(self) -> tuple[GroupFacts, ...]:
        """The decoder, and other passes."""
        others = (replace(group, references=True) for group in self.pass_groups)
        return (GroupFacts(DECODER, references=True), *others)

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
            reuse_filters=self.apply_reused_filters,
            reuse_spatial=self.reuse_spatial_filters and available > 0,
            adapter=self.adapter,
            has_bias=limit != 0,
        )
