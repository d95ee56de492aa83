"""Multi-scale deformable attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from detrelay.core.ops.numbers import filled
from detrelay.core.ops.token_sampling import Shapes, sample_points


class DeformableAttention(nn.Module):
    """Every query samples a few points of every level around its reference.

    Args:
        dim: channels C.
        num_heads: attention heads M.
        num_levels: pyramid levels L.
        num_points: points K per head and level.

    Reference:
        Zhu et al., ICLR 2021, equation 3; checked against fundamentalvision/Deformable-DETR.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, points * 2)
        self.attention_weights = nn.Linear(dim, points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point k of head m starts k + 1 steps from the reference, in the head's direction."""
        nn.init.zeros_(self.sampling_offsets.weight)
        turn = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([turn.cos(), turn.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        grid = (direction[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        init.copy_(self.sampling_offsets.bias, grid.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Tensor, references: Tensor, values: Tensor, shapes: Shapes, valid: Tensor
    ) -> Tensor:
        """Attend.

        Args:
            queries: [B, Q, C], their position added.
            references: [B, Q, L, 2] points, with offsets in cells of the level, or [B, Q, L, 4]
                boxes, with offsets from the centre in half sides / K; in [0, 1] of the padded
                levels.
            values: [B, S, C], the cells of all levels.
            shapes: (H_l, W_l) of each level.
            valid: bool [B, S], False on padding, which is read as zero.

        Returns:
            [B, Q, C].
        """
        value = self.value_proj(values).masked_fill(~valid[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))  # [B, S, M, D]
        per_point = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (self.num_heads, -1))
        weights = self.attention_weights(queries).unflatten(-1, (self.num_heads, -1))
        weights = weights.to(references.dtype).softmax(-1).unflatten(-1, per_point[1:])
        # L, points and (x, y) as one axis: arithmetic along two coordinates alone is slow
        offsets = offsets.to(references.dtype)  # [B, Q, M, L * K * 2]
        around = self._per_point(references[..., :2])
        if references.shape[-1] == 2:
            sizes = filled([(width, height) for height, width in shapes], references)
            locations = around + offsets / self._per_point(sizes[None, None])
        else:
            halves = references[..., 2:] * (0.5 / self.num_points)
            locations = around + offsets * self._per_point(halves)
        locations = locations.unflatten(-1, (*per_point[1:], 2))
        sampled = sample_points(value, shapes, locations[:, :, :, None], weights[:, :, :, None])
        return self.output_proj(sampled.flatten(2))

    def _per_point(self, by_level: Tensor) -> Tensor:
        """[B, Q, L, 2] as [B, Q, 1, L * K * 2], equal for the points of a level."""
        return by_level[:, :, None, :, None].expand(-1, -1, -1, -1, self.num_points, -1).flatten(3)
