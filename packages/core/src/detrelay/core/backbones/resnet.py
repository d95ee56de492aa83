"""ResNets and ResNeXts of torchvision, some with deformable convolutions."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import deform_conv2d

from detrelay.core.backbones.base import Backbone, BackboneNorm, stage_maps
from detrelay.core.ops.folded_conv import conv_norm, folds, forget_folded

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnext101_32x4d",
    "resnext101_32x4d_dcn",
)
_DEFORMABLE_SUFFIX = "_dcn"


class DeformableConv2d(nn.Conv2d):
    """A convolution whose taps are moved by offsets that a second convolution predicts.

    All channels share their offsets, and taps are not weighted (version 1). Parameters are named
    as in mmdetection; the offsets are (dy, dx) pairs, tap by tap.

    Reference:
        Dai et al., Deformable Convolutional Networks, ICCV 2017.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Replace `conv`, which is square, pads with zeros and has no bias."""
        side, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            side,
            stride=stride,
            padding=padding,
            groups=conv.groups,
            bias=False,
        )
        self.conv_offset = nn.Conv2d(
            conv.in_channels, 2 * side * side, side, stride=stride, padding=padding
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, H / stride, W / stride]."""
        # the operator supports neither bfloat16 nor mixed types
        dtype = torch.promote_types(x.dtype, torch.float32)
        offsets = self.conv_offset(x).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = deform_conv2d(
                x.to(dtype),
                offsets,
                self.weight.to(dtype),
                stride=self.stride,
                padding=self.padding,
            )
        return out.to(x.dtype)


class ResNetBackbone(Backbone):
    """A ResNet without its classifier; parameter names are torchvision's.

    Args:
        name: one of `RESNETS`. With the suffix "_dcn" the 3x3 convolutions of the last three
            stages are deformable.
        norm: "frozen", "eval" or "train", see `DetectorConfig`.
        frozen_stages: number of residual stages that are not trained, including the stem.
        num_stages: how many residual stages there are; fewer than four omit the last ones.
        num_maps: how many maps are returned, counted from the last stage; None for all.
    """

    def __init__(
        self,
        name: str,
        norm: BackboneNorm,
        frozen_stages: int,
        num_stages: int = 4,
        num_maps: int | None = None,
    ) -> None:
        network = _network(name)
        width = network.fc.in_features
        widths = [width >> (3 - stage) for stage in range(num_stages)]
        super().__init__(name, *stage_maps(widths, num_maps))
        self.norm = norm
        self.frozen_stages = frozen_stages
        self.num_stages = num_stages
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.relu, self.maxpool = network.relu, network.maxpool
        for stage in range(1, num_stages + 1):
            self.add_module(f"layer{stage}", network.get_submodule(f"layer{stage}"))
        self.freeze()

    def reset_parameters(self) -> None:
        """Convolutions as torchvision's ResNet (He, fan-out); offsets start at zero."""
        convs = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for conv in convs:
            if isinstance(conv, DeformableConv2d):
                nn.init.zeros_(conv.conv_offset.weight)
                nn.init.zeros_(conv.conv_offset.get_parameter("bias"))

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{stage}") for stage in range(1, self.num_stages + 1)]

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages == 0:
            return []
        return [self.conv1, self.bn1, *self._stages()[: self.frozen_stages]]

    def freeze(self) -> None:
        """Freeze stem and first stages as set, and the affine parameters of frozen norms."""
        frozen: list[nn.Module] = self._frozen_modules()
        if self.norm == "frozen":
            frozen += [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNetBackbone:
        """Switch to training, except for norms whose statistics are fixed."""
        super().train(mode)
        if mode:
            forget_folded(self)
        fixed = [self] if self.norm != "train" else self._frozen_modules()
        for root in fixed:
            for module in root.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of [B, 3, H, W]: one [B, channels[i], H / strides[i], ...] per map."""
        if folds(pixel_values, self.conv1, self.bn1, self.relu):
            x = self.maxpool(conv_norm(pixel_values, self.conv1, self.bn1))
        else:
            x = self.maxpool(self.relu(self.bn1(self.conv1(pixel_values))))
        maps = []
        for stage in self._stages():
            short = _has_plain_blocks(stage) and folds(x, stage)
            x = _folded_stage(stage, x) if short else stage(x)
            maps.append(x)
        return tuple(maps[-len(self.channels) :])


def _has_plain_blocks(stage: nn.Module) -> bool:
    return all(
        type(block) in (BasicBlock, Bottleneck) and type(block.relu) is nn.ReLU
        for block in stage.children()
    )


def _folded_stage(stage: nn.Module, x: Tensor) -> Tensor:
    """What torchvision's blocks do, with a call for each convolution and all that follows it."""
    for block in stage.children():
        assert isinstance(block, BasicBlock | Bottleneck)
        kept = x
        if block.downsample is not None:
            kept = conv_norm(x, block.downsample[0], block.downsample[1], relu=False)
        x = conv_norm(x, block.conv1, block.bn1)
        if isinstance(block, Bottleneck):
            x = conv_norm(x, block.conv2, block.bn2)
            x = conv_norm(x, block.conv3, block.bn3, added=kept)
        else:
            x = conv_norm(x, block.conv2, block.bn2, added=kept)
    return x


def _network(name: str) -> ResNet:
    """The whole network with random weights."""
    if not name.startswith("resnext101_32x4d"):
        return torchvision.models.get_model(name, weights=None)
    # torchvision has the blocks but not this width
    network = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    if name.endswith(_DEFORMABLE_SUFFIX):
        for stage in (network.layer2, network.layer3, network.layer4):
            for block in stage:
                block.conv2 = DeformableConv2d(block.conv2)
    return network
