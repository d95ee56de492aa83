"""Any network of timm that provides feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from detrelay.core.backbones.base import BackboneSettings
from detrelay.core.backbones.library import LibraryBackbone
from detrelay.core.errors import one_line


class TimmBackbone(LibraryBackbone):
    """`timm/NAME`, such as timm/convnext_tiny; needs the package timm.

    Its options are arguments of `timm.create_model`.
    """

    library = "timm"

    def __init__(self, name: str, settings: BackboneSettings) -> None:
        self.options = dict(settings.options)
        super().__init__(name, settings)
        facts: Any = self.network.pretrained_cfg
        self.image_mean, self.image_std = tuple(facts["mean"]), tuple(facts["std"])
        self._is_drawn = not any(p.is_meta for p in self.network.parameters())
        for module in self.network.modules():
            # or transformers would call each module's own rule, which overwrites loaded weights
            object.__setattr__(module, "_is_hf_initialized", True)
            if isinstance(module, _timm().layers.Conv2dSame):
                module.register_forward_hook(_with_plain_size)

    @property
    def timm_name(self) -> str:
        """The network's name in timm."""
        return self.model

    def _network(self, options: Mapping[str, Any], indices: Sequence[int] | None) -> nn.Module:
        if indices is None:
            indices = range(len(self._create(options).feature_info))
        return self._create(options, features_only=True, out_indices=list(indices))

    def _create(self, options: Mapping[str, Any], **more: Any) -> Any:
        try:
            # timm's transformers take images of any size only if told so
            return _timm().create_model(self.timm_name, dynamic_img_size=True, **options, **more)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            return _timm().create_model(self.timm_name, **options, **more)

    def _maps(self, network: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
        maps = tuple(network(pixel_values))
        if str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC"):
            return tuple(level.movedim(-1, 1) for level in maps)
        return maps

    @property
    def _indices(self) -> list[int]:
        info: Any = self.network.feature_info
        return list(info.out_indices)

    def reset_parameters(self) -> None:
        """Random weights as timm draws them; loaded ones are kept."""
        if self._is_drawn:
            return
        fresh = dict(_tensors(self._network(self.options, self._indices)))
        for name, value in _tensors(self.network):
            init.copy_(value, fresh[name])

    def load_pretrained(self, source: str) -> None:
        """Load pre-trained weights.

        Args:
            source: "imagenet" (timm's weights for this name, downloaded once) or a file of timm's
                weights.

        Raises:
            ValueError: there are none, or they belong to another network.
        """
        overlay = {} if source == "imagenet" else {"file": str(Path(source))}
        try:
            theirs = self._create(
                self.options,
                features_only=True,
                out_indices=self._indices,
                pretrained=True,
                pretrained_cfg_overlay=overlay,
            )
            self._take(theirs.state_dict())
        except Exception as error:  # may come from any library below
            raise ValueError(
                f"{source}: not the weights of a {self.name}: {one_line(error)}"
            ) from error


def _tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def _with_plain_size(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """A hook for graphs: the output as it is, its size as the input's over the stride.

    TensorFlow's padding depends on the size. As a formula of symbols it grows with every stride
    until tracing a detector takes many minutes instead of seconds.
    """
    if not torch.compiler.is_exporting():
        return output
    sides = zip(inputs[0].shape[-2:], module.stride, strict=True)
    size: Any = [(side + stride - 1) // stride for side, stride in sides]
    return F.interpolate(output, size=size, mode="nearest")


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError("needs timm; pip install 'detrelay[timm]'") from error
    return timm
