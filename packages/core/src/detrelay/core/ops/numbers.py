"""Host numbers as tensors, without a copy that the device waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def filled(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """Numbers [R, C] in the dtype and on the device of `like`.

    `like.new_tensor(rows)` would copy from the host, for which a GPU waits, and would fix sizes of
    images in an exported graph, where they are symbols.
    """
    columns = [
        torch.stack(
            [torch.full((), number, dtype=like.dtype, device=like.device) for number in row]
        )
        for row in rows
    ]
    return torch.stack(columns)
