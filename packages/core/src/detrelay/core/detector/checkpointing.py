"""Activation checkpointing: trades time for memory, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# torchvision's, transformers' and timm's; the layers of a head are named by its model
_BACKBONE_BLOCKS = frozenset(
    {"BasicBlock", "Bottleneck", "ConvNextLayer", "ResNetBasicLayer", "ResNetBottleNeckLayer"}
)


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The stages and encoder layers of the head and the blocks of the backbone.

    Layers that learn batch statistics are left out: run again in the backward pass, they would
    update them twice.
    """
    was_training = model.training
    model.train()
    layers = [
        module
        for module in model.modules()
        if _repeats(model, module)
        # of nested layers, the innermost
        and not any(_repeats(model, inner) for inner in module.modules() if inner is not module)
        and not any(map(_learns_statistics, module.modules()))
    ]
    model.train(was_training)
    return layers


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of `repeated_layers` and recompute each in the backward pass.

    Losses and gradients stay the same.
    """
    set_checkpointing(model, partial(checkpoint, use_reentrant=False))


def set_checkpointing(
    model: PreTrainedModel, function: Callable[..., Any] | None, every_n_layers: int = 1
) -> None:
    """Let layers keep only their inputs and be recomputed in the backward pass.

    Args:
        model: changed in place.
        function: calls its first argument with the others, such as
            `torch.utils.checkpoint.checkpoint`; None to switch it off.
        every_n_layers: only every n-th layer.
    """
    for index, layer in enumerate(repeated_layers(model)):
        ours = not isinstance(layer, GradientCheckpointingLayer)
        if ours and getattr(layer, "gradient_checkpointing", False):
            del layer.forward
        chosen = function is not None and index % every_n_layers == 0
        # where transformers looks, for its own layers and for whether it is switched on
        object.__setattr__(layer, "gradient_checkpointing", chosen)
        object.__setattr__(layer, "_gradient_checkpointing_func", function)
        if ours and chosen and function is not None:
            layer.forward = partial(function, layer.forward)


def _repeats(model: PreTrainedModel, module: nn.Module) -> bool:
    names = _BACKBONE_BLOCKS | set(model._no_split_modules or ())
    return type(module).__name__ in names or isinstance(module, GradientCheckpointingLayer)


def _learns_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training and module.track_running_stats
