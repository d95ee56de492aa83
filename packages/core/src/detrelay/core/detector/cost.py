"""Parameters and arithmetic of a detector by part."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Parts by pattern of a module's path; the first match counts. What a module computes itself, not in
# its submodules, may be two things: products of two activations are recognised by their operation.
_PARTS: tuple[tuple[str, str], ...] = (
    (r"^backbone\b", "backbone"),
    (r"^neck\b", "neck"),
    (r"\bmixing\.adapters\b", "static adapters of reused filters"),
    (r"\bmixing\.(channel_gates|channel_biases|pattern|point)", "gates of reused filters"),
    (r"\bmixing\.(generator|bias_generator)\b", "generating filters"),
    (r"\bmixing\.(out_proj|norm)\b", "from mixed features to the query"),
    (r"\bmixing$", "generating filters"),
    (r"\bpoints\b", "sampling points"),
    (r"\bencoder\b|\bencode\b", "encoder"),
    (r"attention", "attention of queries"),
    (r"\bffn|\blinear", "feed-forward networks"),
    (r"\b(classify|refine)", "class scores and boxes"),
)  # fmt: skip
_APPLYING = "applying filters, own and reused"
_REST = "rest of the head"
_PRODUCTS_OF_ACTIVATIONS = ("bmm", "baddbmm")


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Number of parameters and buffers, by part."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(name.rpartition(".")[0])] += parameter.numel()
    return dict(counts)


@torch.no_grad()
def operations_by_part(model: nn.Module, pixels: Tensor) -> dict[str, int]:
    """Floating-point operations per pass in matrix products and convolutions, by part.

    Args:
        model: in evaluation mode.
        pixels: images [B, 3, H, W].
    """
    # the counter refuses a parameter that a module gets as its input while gradients are off
    frozen = copy.deepcopy(model).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch warns about GPUs of other vendors
        # the counter does not support oneDNN's fused convolutions: count those of the modules
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
            frozen(pixel_values=pixels)
    return _by_part(counter.get_flop_counts(), type(model).__name__)


def _by_part(counted: Mapping[str, Mapping[Any, int]], root: str) -> dict[str, int]:
    """Operations of each part.

    Args:
        counted: operations by module and kind, including those of its submodules.
        root: name of the model itself in it.
    """
    own: dict[str, Counter[Any]] = {
        name: Counter(kinds) for name, kinds in counted.items() if name != "Global"
    }
    for name, kinds in counted.items():
        parent = name.rpartition(".")[0]
        while parent and parent not in own:  # lists of modules are not called
            parent = parent.rpartition(".")[0]
        if parent and name != "Global":
            own[parent].subtract(kinds)
    result: Counter[str] = Counter()
    for name, kinds in own.items():
        path = name.removeprefix(root).removeprefix(".")
        for kind, operations in kinds.items():
            part = _part(path)
            if re.search(r"\bmixing$", path) and _is_product_of_activations(kind):
                part = _APPLYING
            result[part] += operations
    return {part: operations for part, operations in result.items() if operations}


def _is_product_of_activations(kind: Any) -> bool:
    return str(kind).rpartition(".")[2] in _PRODUCTS_OF_ACTIVATIONS


def _part(path: str) -> str:
    return next((part for pattern, part in _PARTS if re.search(pattern, path)), _REST)
