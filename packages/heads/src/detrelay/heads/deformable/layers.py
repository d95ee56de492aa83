"""Shared by Deformable DETR and the detectors built on it: config, encoder, decoder layer.

Reference:
    Zhu et al., Deformable DETR, ICLR 2021 (arXiv 2010.04159). Checked against the released code,
    fundamentalvision/Deformable-DETR (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from detrelay.core.detector.config import require_positive
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.detector.pyramid import LevelMapper
from detrelay.core.losses import CLASS_PRIOR_BIAS
from detrelay.core.ops.attention import attend
from detrelay.core.ops.deformable_attention import DeformableAttention
from detrelay.core.ops.position_encoding import grid_position_code, sine_code
from detrelay.core.ops.token_sampling import Shapes, flatten_levels
from detrelay.core.structures import FeaturePyramid, at_least_float32
from detrelay.heads.query_sets import QuerySetsConfig

_BOX_TEMPERATURE = 10000.0


@strict
class DeformableConfig(QuerySetsConfig):
    """Configuration that detectors with a deformable encoder and decoder share.

    Attributes:
        backbone_norm: as in `DetectorConfig`; the published models freeze all of it.
        d_model: C, width of queries and feature maps.
        num_attention_heads: heads of self-attention and of deformable attention.
        num_points: points that a head samples on each level.
        num_levels: L, pyramid levels.
        num_backbone_levels: how many of them are backbone maps, counted from the coarsest; the
            others are made on top.
        encoder_layers: layers of the encoder.
        decoder_layers: S, stages of the decoder.
        ffn_dim: hidden width of the feed-forward networks.
        dropout: share of entries dropped in attention weights, feed-forward and residuals.
    """

    model_type = "detrelay_deformable"

    backbone_norm: Literal["frozen", "eval", "train"] = "frozen"
    num_queries: int = 300
    d_model: int = 256
    num_attention_heads: int = 8
    num_points: int = 4
    num_levels: int = 4
    num_backbone_levels: int = 3
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float | int = 0.1

    def validate_architecture(self) -> None:
        """Reject sizes that do not fit together."""
        super().validate_architecture()
        require_positive(
            self,
            *("num_queries", "num_attention_heads", "num_points", "num_backbone_levels"),
            *("encoder_layers", "decoder_layers", "ffn_dim"),
        )
        if self.d_model % 32 or self.d_model % self.num_attention_heads:
            raise ValueError(
                f"d_model must be a multiple of 32 and of num_attention_heads "
                f"({self.num_attention_heads}); found {self.d_model}"
            )
        if not self.num_backbone_levels <= min(self.num_levels, 4):
            raise ValueError(
                f"num_backbone_levels must lie in 1..4 and not exceed num_levels "
                f"({self.num_levels}); found {self.num_backbone_levels}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); found {self.dropout}")


class DeformableForObjectDetection(DetectorForObjectDetection):
    """Backbone and neck of the deformable detectors; subclasses add the head."""

    config: DeformableConfig
    # "greater than", as in the released Deformable DETR variant of the cross-stage labels
    assigner_options: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {"cross_stage": {"inclusive": False}}
    )
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012 - the base declares it so

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__(config)
        self.backbone = self.build_backbone(num_maps=config.num_backbone_levels)
        self.neck = LevelMapper(self.backbone.channels, config.num_levels, config.d_model)

    @property
    def level_strides(self) -> tuple[float, ...]:
        """The strides of the backbone maps used, then each twice the one before."""
        strides = list(self.backbone.strides)
        while len(strides) < self.config.num_levels:
            strides.append(2 * strides[-1])
        return tuple(strides)


def inverse_sigmoid(x: Tensor, epsilon: float) -> Tensor:
    """Logits of probabilities [...], clamped `epsilon` away from 0 and 1."""
    x = x.clamp(min=0, max=1)
    return (x.clamp(min=epsilon) / (1 - x).clamp(min=epsilon)).log()


def move_boxes(steps: Tensor, references: Tensor, epsilon: float) -> Tensor:
    """Boxes [..., 4] that lie `steps` [..., 4] from references [..., 2 or 4], in logits.

    Points have no size: there the last two steps are the size itself.
    """
    start = inverse_sigmoid(references, epsilon)
    start = F.pad(start, (0, 4 - start.shape[-1]))
    return (start + steps.to(start.dtype)).sigmoid()


def box_code(boxes: Tensor, dim: int) -> Tensor:
    """Sine code [..., 2 * dim] of boxes [..., 4] in [0, 1], one coordinate after another."""
    return sine_code(at_least_float32(boxes), dim // 2, _BOX_TEMPERATURE).to(boxes.dtype)


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., widths[0]] -> [..., widths[-1]]."""
        for index, layer in enumerate(self.layers):
            x = layer(x.relu() if index else x)
        return x


def reset_class_head(head: nn.Module) -> None:
    """Let the class scores start at their prior."""
    nn.init.constant_(head.get_parameter("bias"), CLASS_PRIOR_BIAS)


def reset_box_head(head: nn.Module) -> None:
    """Let the boxes start at their references."""
    assert isinstance(head, Mlp)
    last = head.layers[-1]
    nn.init.zeros_(last.get_parameter("weight"))
    nn.init.zeros_(last.get_parameter("bias"))


def xavier_linears(*linears: nn.Linear) -> None:
    """Xavier-uniform weights; biases stay as the framework drew them."""
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """Where the tokens of a batch lie.

    Attributes:
        shapes: (H_l, W_l) of each level; S = sum of H_l * W_l.
        valid: bool [B, S], False on padding.
        centers: [B, S, 2], (x, y) of every token in units of the unpadded image; beyond 1 on
            padding.
        ratios: [B, L, 2], share of each level's width and height that the image covers.
    """

    shapes: Shapes
    valid: Tensor
    centers: Tensor
    ratios: Tensor

    def in_levels(self, references: Tensor) -> Tensor:
        """References of the image [B, Q, 2 or 4] as seen from each padded level, [B, Q, L, ...]."""
        ratios = self.ratios if references.shape[-1] == 2 else self.ratios.repeat(1, 1, 2)
        return references[:, :, None] * ratios[:, None]


def token_grid(valid: Sequence[Tensor], dtype: torch.dtype) -> TokenGrid:
    """The grid of levels whose unpadded cells are `valid`, L times bool [B, H_l, W_l]."""
    centers, ratios = [], []
    for level in valid:
        height, width = level.shape[1:]
        real = torch.stack([level[:, 0].sum(1), level[:, :, 0].sum(1)], dim=1).to(dtype)  # w, h
        x = torch.arange(width, dtype=dtype, device=level.device) + 0.5
        y = torch.arange(height, dtype=dtype, device=level.device) + 0.5
        cells = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
        centers.append(cells.flatten(0, 1) / real[:, None])
        ratios.append(torch.stack([real[:, 0] / width, real[:, 1] / height], dim=1))
    return TokenGrid(
        shapes=tuple((level.shape[1], level.shape[2]) for level in valid),
        valid=torch.cat([level.flatten(1) for level in valid], dim=1),
        centers=torch.cat(centers, dim=1),
        ratios=torch.stack(ratios, dim=1),
    )


class FeedForward(nn.Module):
    """Two linear layers with a residual connection, then LayerNorm."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, hidden)
        self.narrow = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights."""
        xavier_linears(self.widen, self.narrow)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        hidden = self.dropout(self.widen(x).relu_())
        return self.norm(x + self.dropout(self.narrow(hidden)))


class EncoderLayer(nn.Module):
    """Every token samples a few points of every level."""

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__()
        dim = config.d_model
        self.attention = DeformableAttention(
            dim, config.num_attention_heads, config.num_levels, config.num_points
        )
        self.attention_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(dim, config.ffn_dim, config.dropout)

    def forward(
        self, tokens: Tensor, position: Tensor, references: Tensor, grid: TokenGrid
    ) -> Tensor:
        """Tokens and their position code [B, S, C], references [B, S, L, 2] -> [B, S, C]."""
        read = self.attention(tokens + position, references, tokens, grid.shapes, grid.valid)
        return self.ffn(self.attention_norm(tokens + self.dropout(read)))


class DeformableEncoder(nn.Module):
    """Pyramid levels to tokens with multi-scale context.

    Args:
        config: sizes.
        temperature: of the position code, see `grid_position_code`.
        offset: of the position code.
    """

    def __init__(self, config: DeformableConfig, temperature: float, offset: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.offset = offset
        self.level_code = nn.Parameter(torch.empty(config.num_levels, config.d_model))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Level codes of unit variance."""
        nn.init.normal_(self.level_code)

    def forward(self, pyramid: FeaturePyramid) -> tuple[Tensor, TokenGrid]:
        """Encode L levels [B, C, H_l, W_l] to tokens [B, S, C] and where they lie."""
        tokens, _ = flatten_levels(pyramid.levels)
        grid = token_grid(pyramid.valid, torch.promote_types(tokens.dtype, torch.float32))
        position = torch.cat(
            [
                grid_position_code(
                    valid, tokens.shape[-1], self.temperature, self.offset, tokens.dtype
                )
                + code
                for valid, code in zip(pyramid.valid, self.level_code, strict=True)
            ],
            dim=1,
        )
        references = grid.in_levels(grid.centers)
        for layer in self.layers:
            tokens = layer(tokens, position, references, grid)
        return tokens, grid


class DecoderLayer(nn.Module):
    """Queries attend to each other, then sample a few points of every level."""

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__()
        dim, heads = config.d_model, config.num_attention_heads
        self.config = config
        self.self_attention = nn.MultiheadAttention(dim, heads, config.dropout, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, config.num_levels, config.num_points)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.ffn = FeedForward(dim, config.ffn_dim, config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections (the packed one as a whole), zero biases."""
        attention = self.self_attention
        nn.init.xavier_uniform_(attention.in_proj_weight)
        nn.init.zeros_(attention.in_proj_bias)
        nn.init.xavier_uniform_(attention.out_proj.weight)
        nn.init.zeros_(attention.out_proj.bias)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        references: Tensor,
        memory: tuple[Tensor, TokenGrid],
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Refine the queries once.

        Args:
            queries: [B, Q, C].
            position: [B, Q, C], added to queries and keys.
            references: [B, Q, 2] points or [B, Q, 4] boxes in [0, 1] of the unpadded image.
            memory: what the encoder returned.
            attn_mask: bool [Q, Q], True where the row's query must not see the column's.

        Returns:
            The refined queries [B, Q, C], and those of a second branch, if the layer has one.
        """
        queries = self.attend(queries, position, attn_mask)
        return self.ffn(self.read(queries, position, references, memory)), None

    def attend(self, queries: Tensor, position: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Self-attention: [B, Q, C] -> [B, Q, C]."""
        placed = queries + position
        bias = None
        if attn_mask is not None:
            bias = queries.new_zeros(attn_mask.shape).masked_fill(attn_mask, -torch.inf)
        module = self.self_attention
        projected = []
        for x, weight, shift in zip(
            (placed, placed, queries),
            module.in_proj_weight.chunk(3),
            module.in_proj_bias.chunk(3),
            strict=True,
        ):
            heads = F.linear(x, weight, shift).unflatten(-1, (module.num_heads, -1))
            projected.append(heads.transpose(1, 2))  # [B, heads, Q, D]
        dropout = module.dropout if self.training else 0.0
        query, key, value = projected
        implementation = self.config._attn_implementation or "sdpa"
        read = attend(query, key, value, bias, implementation, dropout)
        attended = module.out_proj(read.transpose(1, 2).flatten(2))
        return self.self_attention_norm(queries + self.dropout(attended))

    def read(
        self,
        queries: Tensor,
        position: Tensor,
        references: Tensor,
        memory: tuple[Tensor, TokenGrid],
    ) -> Tensor:
        """Cross-attention: [B, Q, C] -> [B, Q, C]."""
        tokens, grid = memory
        read = self.cross_attention(
            queries + position, grid.in_levels(references), tokens, grid.shapes, grid.valid
        )
        return self.cross_attention_norm(queries + self.dropout(read))


class ReadFirstDecoderLayer(DecoderLayer):
    """Cross-attention first: one-to-many predictions branch off before self-attention.

    Reference:
        Zhao et al. (MS-DETR), CVPR 2024.
    """

    def __init__(self, config: DeformableConfig) -> None:
        super().__init__(config)
        self.branch_ffn = FeedForward(config.d_model, config.ffn_dim, config.dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        references: Tensor,
        memory: tuple[Tensor, TokenGrid],
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `DecoderLayer.forward`; the branch is left out in evaluation."""
        queries = self.read(queries, position, references, memory)
        branch = self.branch_ffn(queries) if self.training else None
        return self.ffn(self.attend(queries, position, attn_mask)), branch
