"""Sampling points: where in the pyramid each query looks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from detrelay.heads.stageinteractor.geometry import sizes_of


def uniform_offsets(*shape: int, bound: float) -> Tensor:
    """Random (x, y) offsets in [-bound, bound] with a zero third coordinate: [*shape, 3]."""
    offsets = torch.zeros(*shape, 3)
    offsets[..., :2].uniform_(-bound, bound)
    return offsets


class PointGenerator(nn.Module):
    """Makes the 3-D sampling points of every query: positions and a scale.

    With a pattern, the points of a group are made in two steps: P base points and, around each,
    scaled by its z, one pattern of K points shared by all groups.

    Args:
        dim: C.
        groups: G.
        base_points: P.
        pattern: K.
        two_step: False predicts all P * K points of a group directly.
        start_scale: z of new base points, log2 of pixels.

    Reference:
        Teng et al., ICCV 2023, section 3.4; one-step points are the released code's
        `use_holistic_sampling_points`, and AdaMixer's.
    """

    def __init__(
        self,
        dim: int,
        groups: int,
        base_points: int,
        pattern: int,
        two_step: bool,
        start_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.start_scale = start_scale
        self.groups = groups
        self.pattern = pattern
        points = base_points if two_step else base_points * pattern
        self.base = nn.Linear(dim, 3 * groups * points)
        self.inner = nn.Linear(dim, 3 * pattern) if two_step else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points spread over the box at random, the same for every query."""
        nn.init.zeros_(self.base.weight)
        base = uniform_offsets(self.base.out_features // 3, bound=0.5)
        base[:, 2] = self.start_scale
        init.copy_(self.base.bias, base.flatten())
        if self.inner is not None:
            nn.init.zeros_(self.inner.weight)
            inner = uniform_offsets(self.pattern, bound=0.5 / math.sqrt(2))
            inner[0] = 0  # the first point of a pattern is its base point
            init.copy_(self.inner.bias, inner.flatten())

    def forward(self, queries: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Points of every query.

        Args:
            queries: [B, Q, C].
            boxes: [B, Q, 4] x, y, z = log2 of the scale, r = log2 of height / width; pixels.

        Returns:
            Positions [2, B, Q, G, N] (x, then y) in pixels and scales [B, Q, G, N] (log2 pixels).
        """
        center, scale, size = boxes[..., :2], boxes[..., 2:3], sizes_of(boxes)
        offsets = self.base(queries).to(boxes.dtype).unflatten(-1, (self.groups, -1, 1, 3))
        offsets = offsets.movedim(-1, 0).contiguous()
        xy, z = offsets[:2], offsets[2]  # [2, B, Q, G, P, 1], [B, Q, G, P, 1]
        if self.inner is not None:
            inner = self.inner(queries).to(boxes.dtype).unflatten(-1, (1, 1, -1, 3))
            inner = inner.movedim(-1, 0)
            xy = xy + 2**z * inner[:2]  # [2, B, Q, G, P, K]
            z = z + inner[2]
        xy, z = xy.flatten(-2), z.flatten(-2)  # [..., N]
        center, size = (x.movedim(-1, 0)[..., None, None] for x in (center, size))
        positions = center + size * xy
        return positions, scale[:, :, None] + z
