"""Shared by the comparisons of Deformable DETR and DINO with their released code."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from detrelay.assigners import build_assigners
from detrelay.core.backbones import ResNetBackbone
from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.detector.pyramid import LevelMapper, build_pyramid
from detrelay.core.losses import LossConfig
from detrelay.core.structures import FeaturePyramid, Targets
from detrelay.heads.convert.conversion import translate
from detrelay.heads.deformable.layers import DeformableConfig
from reference import DEFORMABLE_TARGETS, deformable_images, deformable_value

SMALL = (((200, 288), (224, 240)), (224, 288))
TINY = (((64, 128), (96, 96)), (96, 128))
LOSS_NAMES = {"class": "ce", "l1": "bbox", "giou": "giou"}


def fill(model: nn.Module, keys: dict[str, list[int]], config: DeformableConfig) -> dict[str, str]:
    """Give a model the weights of the reference runs; returns official names by ours."""
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    translation = translate(
        {key: deformable_value(key, shape) for key, shape in keys.items()}, config
    )
    # without its backbone; the keys may be those of a deeper model
    state = {name: value for name, value in translation.state.items() if name in shapes}
    assert {key for key in shapes if not key.endswith("num_batches_tracked")} == state.keys()
    model.load_state_dict(state, strict=False)
    model.double()
    model.load_state_dict(state, strict=False)
    return {name: key for key, name in translation.used}


class Body(nn.Module):
    """Neck and head of a model on ResNet-50, whose maps are the same in all runs."""

    def __init__(self, config: DeformableConfig, head: nn.Module) -> None:
        super().__init__()
        self.neck = LevelMapper((512, 1024, 2048), config.num_levels, config.d_model)
        self.head = head

    def pyramid(
        self, sizes: tuple[tuple[int, int], ...], canvas: tuple[int, int]
    ) -> FeaturePyramid:
        """Levels of the reference images."""
        mask = deformable_images(sizes, canvas)[1]
        return build_pyramid(self.neck(backbone_maps(sizes, canvas)), (8, 16, 32, 64), mask)


@cache
def backbone_maps(
    sizes: tuple[tuple[int, int], ...], canvas: tuple[int, int]
) -> tuple[Tensor, ...]:
    """Maps of the reference images; the backbone is the same in all runs."""
    backbone = ResNetBackbone("resnet50", "frozen", 1).double().eval()
    state = {
        key: deformable_value(f"backbone.0.body.{key}", list(value.shape))
        for key, value in backbone.state_dict().items()
    }
    backbone.load_state_dict(state)
    with torch.no_grad():
        return backbone(deformable_images(sizes, canvas)[0])


def reference_targets() -> Targets:
    return Targets.from_labels(
        [
            {
                "class_labels": torch.tensor(item["class_labels"]),
                "boxes": torch.tensor(item["boxes"]).double(),
            }
            for item in DEFORMABLE_TARGETS
        ]
    )


def criterion(loss: LossConfig) -> Criterion:
    return Criterion(loss.terms(), build_assigners("hungarian", loss))


def check_losses(
    output: CriterionOutput, expected: dict[str, Tensor], stages: int, prefix: str = "loss."
) -> None:
    """Every loss term under its official name, and the weighted total."""
    for key, value in output.losses.items():
        group, stage, term = key.split("/")
        suffix = {"decoder": "", "denoising": "_dn", "proposals": "_enc"}[group]
        if group != "proposals" and int(stage) < stages - 1:
            suffix += f"_{stage}"
        official = f"{prefix}loss_{LOSS_NAMES[term]}{suffix}"
        if official not in expected:
            official = official.replace("_enc", "_interm")
        wanted = expected[official].item()
        assert value.item() == pytest.approx(wanted, rel=1e-6, abs=1e-7), key
    wanted = expected[f"{prefix}total_weighted"].item()
    assert output.total.item() == pytest.approx(wanted, rel=4e-7)


def check_matches(
    output: CriterionOutput, targets: Targets, expected: dict[str, Tensor], prefix: str = "match."
) -> None:
    """One-to-one pairs of every stage, exactly."""
    for group, tag in (("decoder", None), ("proposals", "enc")):
        assignments = output.assignments.get(group, ())
        for stage, assignment in enumerate(assignments):
            name = tag or (str(stage) if stage < len(assignments) - 1 else "last")
            if f"{prefix}{name}.0" not in expected:
                name = "interm"
            pairs = assignment.boxes
            for image in range(targets.batch_size):
                mine = pairs.image == image
                first = int((targets.image < image).sum())
                query, target = expected[f"{prefix}{name}.{image}"].long()
                order = target.argsort()
                assert torch.equal(pairs.query[mine], query[order]), (group, stage, image)
                assert torch.equal(pairs.target[mine] - first, target[order])


def check_gradients(model: nn.Module, names: dict[str, str], expected: dict[str, Tensor]) -> int:
    """Gradient norms of all trained parameters; returns their number.

    Sampling offsets are compared more loosely: the released runs keep their reference points in
    float32, and where one lies on the edge of a cell its gradient jumps.
    """
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        norm = expected[f"grad_norm.{names[name]}"].item()
        limit = 3e-3 if "sampling_offsets" in name else 1e-4
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=limit, abs=1e-9), name
        compared += 1
    return compared
