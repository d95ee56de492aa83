"""Self-attention among queries that takes the overlap of their boxes into account."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detrelay.core.ops.attention import attend
from detrelay.heads.stageinteractor.config import StageInteractorConfig
from detrelay.heads.stageinteractor.geometry import log_coverage


class OverlapBiasedAttention(nn.Module):
    """Self-attention among queries, biased towards queries whose box covers one's own.

    Adds tau_h * ln(intersection / own area + 1e-7) to the logits of head h.

    Reference:
        Gao et al. (AdaMixer), CVPR 2022, section 3.3.
    """

    def __init__(self, config: StageInteractorConfig) -> None:
        super().__init__()
        dim, num_heads = config.d_model, config.num_attention_heads
        self.config = config
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
        bias = self.overlap_scale.view(-1, 1, 1) * log_coverage(boxes)[:, None]
        implementation = self.config._attn_implementation
        attended = attend(query, key, value, bias.to(query.dtype), implementation)
        return self.out_proj(attended.transpose(1, 2).flatten(2))
