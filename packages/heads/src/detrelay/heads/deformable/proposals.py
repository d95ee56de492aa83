"""Proposals: initial boxes for the decoder from the encoder's tokens.

Reference:
    Zhu et al., Deformable DETR, ICLR 2021, its two-stage variant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detrelay.heads.deformable.layers import TokenGrid, xavier_linears

# side of the anchors on the finest level, in units of the image; doubles from level to level
_ANCHOR_SIDE = 0.05
# anchors with a number outside this range propose nothing
_ANCHOR_RANGE = (0.01, 0.99)


class ProposalFeatures(nn.Module):
    """Encoder tokens to what proposals are made from: a feature and an anchor each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights."""
        xavier_linears(self.project)

    def forward(self, tokens: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Prepare the proposals of a batch.

        Args:
            tokens: [B, S, C].
            grid: where they lie.

        Returns:
            Features [B, S, C]; anchors [B, S, 4], logits of boxes, infinite where there is none;
            and where there is one, bool [B, S]. Tokens without an anchor share one feature.
        """
        sides = [
            grid.centers.new_full((height * width, 2), _ANCHOR_SIDE * 2**level)
            for level, (height, width) in enumerate(grid.shapes)
        ]
        boxes = torch.cat([grid.centers, torch.cat(sides).expand_as(grid.centers)], dim=-1)
        low, high = _ANCHOR_RANGE
        proposes = grid.valid & ((boxes > low) & (boxes < high)).all(-1)
        # filled first: the logit of a centre beyond 1 would be NaN
        anchors = boxes.masked_fill(~proposes[..., None], 0.5).logit()
        anchors = anchors.masked_fill(~proposes[..., None], torch.inf)
        features = self.norm(self.project(tokens.masked_fill(~proposes[..., None], 0)))
        return features, anchors, proposes


def best_tokens(scores: Tensor, proposes: Tensor, count: int) -> Tensor:
    """Indices [B, min(count, S)] of the tokens with the highest scores [B, S], best first.

    Tokens that propose nothing come last. The released code lets them compete: where they score
    well, the result of an image then depends on its padding (trained models give them the lowest
    scores).
    """
    ranked = scores.masked_fill(~proposes, torch.finfo(scores.dtype).min)
    return ranked.topk(min(count, scores.shape[1]), dim=1).indices


def take_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Rows [B, k, C] of `values` [B, S, C] that `index` [B, k] names."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
