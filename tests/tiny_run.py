"""A training run of one second: the real head and the real app, as small as possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from detrelay.apps.train import Arguments, train

TINY = (
    "model.backbone_name=resnet18",  # `shrink_backbone` takes its place
    "model.backbone_options={}",
    "model.d_model=32",
    "model.num_groups=2",
    "model.num_attention_heads=2",
    "model.num_stages=3",
    "model.num_queries=8",
    "model.pattern_size=2",
    "model.num_base_points=2",
    "model.num_base_points_first=2",
    "model.num_out_points=8",
    "model.ffn_dim=32",
    "data.image_size=64",
    "data.short_sides=[64]",
    "data.max_size=64",
    "data.eval_short_side=64",
    "data.eval_max_size=64",
    "data.num_train=14",
    "data.num_val=3",
    "data.num_workers=0",
    "train.epochs=2",
    "train.learning_rate=1e-3",
    "train.batch_size=4",
    "train.warmup_steps=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
)


class TinyResNet(nn.Module):
    """The structure of torchvision's ResNet with one narrow convolution per stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        for stage, (inner, outer) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], start=1):
            conv = nn.Conv2d(inner, outer, 3, stride=1 if stage == 1 else 2, padding=1, bias=False)
            setattr(self, f"layer{stage}", nn.Sequential(conv, nn.BatchNorm2d(outer), nn.ReLU()))
        self.fc = nn.Linear(64, 10)


class TinyBlocks(TinyResNet):
    """The same with torchvision's blocks, so that weights have the names of released ones."""

    def __init__(self) -> None:
        super().__init__()
        for stage, (inner, outer) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], start=1):
            stride = 1 if stage == 1 else 2
            skip = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer)
            )
            setattr(self, f"layer{stage}", nn.Sequential(BasicBlock(inner, outer, stride, skip)))


def shrink_backbone(patch: pytest.MonkeyPatch, network: type[nn.Module] = TinyResNet) -> None:
    """Make every ResNet the tiny one, on one core: more would only wait for each other."""
    patch.setattr("detrelay.apps.launch.usable_cores", lambda: 1)
    patch.setattr(torchvision.models, "get_model", lambda name, weights=None: network())


def skip_pictures(patch: pytest.MonkeyPatch) -> None:
    """Draw nothing at evaluations."""
    patch.setattr("detrelay.apps.drawing.Reporter.__call__", lambda self, evaluation: None)


def tiny_arguments(output: Path, *settings: str, **options: Any) -> Arguments:
    """Arguments of a run of 2 epochs of 3 steps; `settings` come after the tiny ones."""
    recipe = None if options.get("resume") else "shapes"
    return Arguments(**{"recipe": recipe, "output": output, "set": (TINY, settings), **options})


def tiny_run(output: Path, *settings: str, **options: Any) -> int:
    """Train; returns the exit code."""
    return train(tiny_arguments(output, *settings, **options))


def final_weights(output: Path) -> dict[str, Tensor]:
    """The final weights of a run."""
    return load_file(output / "last" / "model.safetensors")
