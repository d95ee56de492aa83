"""Attention in the implementation that a config names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    implementation: str,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention over [B, heads, Q, D].

    Args:
        query: [B, heads, Q, D].
        key: [B, heads, Q, D].
        value: [B, heads, Q, D].
        bias: added to the logits, broadcast to [B, heads, Q, Q]; minus infinity masks.
        implementation: transformers' name; "eager" computes the formula explicitly, others use
            torch's kernel unless a graph is exported.
        dropout: share of attention weights that are dropped.
    """
    # while exporting, strides of torch's kernels would make views of what other runtimes must copy
    if implementation != "eager" and not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(query, key, value, bias, dropout_p=dropout)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return F.dropout(weights, dropout) @ value
