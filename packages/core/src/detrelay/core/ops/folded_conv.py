"""Convolution, fixed batch norm, addition and ReLU as one call of oneDNN, where that is possible.

Folding a batch norm into the weights alone gains nothing measurable in eager PyTorch; what gains a
third of a ResNet's time is that nothing is written between the convolution and the ReLU, and that
maps stay channels-last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from detrelay.core.ops.eager import runs_at_once_on_cpu


@dataclass(frozen=True)
class _Folded:
    """Weights with the norm in them, and of what they were made.

    Attributes:
        weight: as of the convolution, channels-last, or in oneDNN's own order.
        bias: [out_channels].
        sources: aliases of the tensors that both come from; they keep the memory from being used
            anew, so an address says whose values these are.
        state: address and version of each source.
    """

    weight: Tensor
    bias: Tensor
    sources: tuple[Tensor, ...]
    state: tuple[tuple[int, int], ...]


_known: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


def folds(x: Tensor, *modules: nn.Module) -> bool:
    """Whether `conv_norm` may stand for convolutions and norms: the same numbers up to rounding.

    On a CPU in float32, without autocast, tracing or anything that needs a gradient; the modules
    are PyTorch's own convolutions and norms (or hold them), the norms' statistics are fixed, and
    nothing looks at what a module gives.

    Args:
        x: what goes in.
        *modules: whose calls are left out.
    """
    if not (
        runs_at_once_on_cpu(x)
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and not (torch.is_grad_enabled() and x.requires_grad)
    ):
        return False
    return all(_is_plain(module) for root in modules for module in root.modules())


def _is_plain(module: nn.Module) -> bool:
    # `forward` in the instance is a wrapper, such as of activation checkpointing
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if isinstance(module, nn.BatchNorm2d):
        if type(module) is not nn.BatchNorm2d or module.training or module.running_var is None:
            return False
    elif isinstance(module, nn.Conv2d):
        if type(module) is not nn.Conv2d or module.padding_mode != "zeros":
            return False
        if isinstance(module.padding, str):
            return False
    values = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return all(
        value.device.type == "cpu"
        and value.dtype == torch.float32
        and not value.is_inference()
        and not (torch.is_grad_enabled() and value.requires_grad)
        for value in values
        if value.is_floating_point()
    )


def conv_norm(
    x: Tensor, conv: nn.Module, norm: nn.Module, *, relu: bool = True, added: Tensor | None = None
) -> Tensor:
    """relu(norm(conv(x)) + added), where `folds` allows it.

    The folded weights are a second copy, kept until the weights change, training mode is switched
    on or the module goes. Values that are changed through `.data` are not seen; that is what
    PyTorch's own version counter misses, too.

    Args:
        x: [B, in_channels, H, W].
        conv: a convolution.
        norm: the batch norm after it.
        relu: False for none.
        added: what to add before the ReLU, as large as the result.
    """
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    folded = _folded(conv, norm)
    shape = _shape_of(conv)
    call = torch.ops.mkldnn._convolution_pointwise
    weights = (folded.weight, folded.bias)
    result: Tensor
    if added is None:
        result = call(x, *weights, *shape, "relu" if relu else "none", [], "")
    else:
        unary = "relu" if relu else None
        result = call.binary(x, added, *weights, *shape, "add", None, unary, [], None)
    return result


def _shape_of(conv: nn.Conv2d) -> tuple[list[Any], list[Any], list[Any], int]:
    """Padding, stride, dilation and groups."""
    return list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups


def forget_folded(module: nn.Module) -> None:
    """Let go of the folded weights of a module and of all inside."""
    for inner in module.modules():
        _known.pop(inner, None)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> _Folded:
    sources = tuple(_sources(conv, norm))
    state = tuple((source.data_ptr(), source._version) for source in sources)
    found = _known.get(conv)
    if found is None or found.state != state:
        with torch.no_grad():
            found = _fold(conv, norm, sources, state)
        _known[conv] = found
    return found


def _sources(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Iterator[Tensor]:
    for value in (
        *(conv.weight, conv.bias),
        *(norm.weight, norm.bias, norm.running_mean, norm.running_var),
    ):
        if value is not None:
            yield value


def _fold(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    sources: tuple[Tensor, ...],
    state: tuple[tuple[int, int], ...],
) -> _Folded:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    weight = (conv.weight * scale[:, None, None, None]).contiguous(
        memory_format=torch.channels_last
    )
    if conv.kernel_size != (1, 1):
        # In oneDNN's own order, which each call would have to make first: a third of the time of a
        # ResNet-18 at 128 pixels. Its order for 1 x 1 takes three times as long as plain weights.
        weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *_shape_of(conv))
    return _Folded(
        weight,
        bias,
        tuple(source.detach() for source in sources),
        state,
    )
