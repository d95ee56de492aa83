"""What every detector rejects with one clear error, and what loading must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForObjectDetection

from detrelay.assigners import build_assigners
from detrelay.core.backbones import Backbone, SwinBackbone
from detrelay.core.criterion import Criterion
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.losses import LossConfig
from detrelay.core.structures import Targets
from detrelay.heads import HEADS
from factories import SMALL_HEADS, make_targets, small_head_config
from tiny_run import TinyBlocks, shrink_backbone

CASES = pytest.mark.parametrize("case", ["stageinteractor", "deformable_detr", "dn_detr", "dino"])


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch, TinyBlocks)
        yield


def make_model(case: str, **changes: Any) -> DetectorForObjectDetection:
    torch.manual_seed(0)
    return HEADS[SMALL_HEADS[case][0]].model(small_head_config(case, **changes))


def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def corner(*shape: int) -> Tensor:
    mask = torch.zeros(2, 64, 96, dtype=torch.int64)
    mask[:, : shape[0], : shape[1]] = 1
    return mask


@CASES
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pixel_values": pixels()[:0]}, ValueError, "one image, found \\[0, 3, 64, 96\\]"),
        ({"pixel_values": pixels()[:, :1]}, ValueError, "found \\[2, 1, 64, 96\\]"),
        ({"pixel_values": pixels()[0]}, ValueError, "found \\[3, 64, 96\\]"),
        ({"pixel_values": pixels().to(torch.uint8)}, TypeError, "found torch.uint8; the image"),
        ({"pixel_mask": torch.ones(2, 64, 64)}, ValueError, "64, 96\\] .* found \\[2, 64, 64\\]"),
        ({"pixel_mask": torch.zeros(2, 64, 96)}, ValueError, "images \\[0, 1\\] of the batch is 0"),
        ({"targets": make_targets((1, 1, 1))}, ValueError, "targets are of 3 images, .* of 2"),
    ],
    ids=["empty", "grey", "no batch", "bytes", "mask of another size", "no real pixel", "images"],
)  # fmt: skip
def test_input_that_no_detector_reads(
    case: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_model(case).train()
    with pytest.raises(error, match=message):
        model(**{"pixel_values": pixels(), **options})


def bad_targets(label: int, side: float) -> Targets:
    targets = make_targets()
    targets.labels[3] = label
    targets.boxes[3, 2] = side
    return targets


BAD_TARGETS = pytest.mark.parametrize(
    ("targets", "message"),
    [
        (bad_targets(-1, 0.5), "class label -1 found in image 1 .* run from 0 to 3"),
        (bad_targets(4, 0.5), "class label 4 found in image 1 .* scores 4 classes"),
        (bad_targets(0, -0.5), "target box .*-0.5.* in image 1 .* cannot be negative"),
    ],
)


@CASES
@BAD_TARGETS
def test_targets_that_no_image_has(case: str, targets: Targets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(case).train()(pixels(), targets=targets)


@BAD_TARGETS
def test_losses_of_targets_that_no_image_has(targets: Targets, message: str) -> None:
    output = make_model("stageinteractor").train()(pixels())
    losses = LossConfig()
    criterion = Criterion(losses.terms(), build_assigners("hungarian", losses))
    with pytest.raises(ValueError, match=message):
        criterion(output.groups, targets)


def test_a_nan_value_is_named_by_stage_and_image() -> None:
    model = make_model("stageinteractor", backbone_norm="eval").train()
    losses = LossConfig()
    criterion = Criterion(losses.terms(), build_assigners("hungarian", losses))
    spoilt = pixels()
    spoilt[1, 0, 5, 5] = torch.nan
    groups = model(spoilt).groups
    with pytest.raises(FloatingPointError, match="in stage 0; images of the batch: \\[1\\]"):
        criterion(groups, make_targets())


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_are_taken_in_the_dtype_of_the_weights(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make_model(case).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert model.dtype == dtype
    with torch.no_grad():
        output = model(pixels(), corner(60, 90))
    assert output.logits.isfinite().all()
    exact = AutoModelForObjectDetection.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = exact(pixels(), corner(60, 90))
    if SMALL_HEADS[case][0] != "dino":  # which tokens are proposed depends on the last digits
        torch.testing.assert_close(output.pred_boxes, expected.pred_boxes, atol=0.02, rtol=0)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@CASES
@pytest.mark.parametrize(
    "settings",
    [
        {"backbone_norm": "frozen", "backbone_frozen_stages": 1},
        {"backbone_norm": "eval", "backbone_frozen_stages": 4},
        {"backbone_norm": "train", "backbone_frozen_stages": 0},
    ],
)
def test_what_is_frozen_stays_frozen_when_loaded(
    case: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(case, **settings)
    model.save_pretrained(tmp_path)
    loaded, _ = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert trained(loaded) == trained(model)
    assert trained(AutoModelForObjectDetection.from_pretrained(tmp_path)) == trained(model)
    everything = {name for name, _ in model.named_parameters()}
    assert (trained(model) == everything) == (settings["backbone_frozen_stages"] == 0)


class SmallSwinDetector(HEADS["stageinteractor"].model):  # type: ignore[name-defined,misc]
    """With two stages of a Swin transformer, whose others are large."""

    def build_backbone(self, num_stages: int = 4, num_maps: int | None = None) -> Backbone:
        return SwinBackbone("swin_t", self.config.backbone_frozen_stages, 2)


def test_what_is_frozen_of_a_swin_transformer_stays_frozen(tmp_path: Path) -> None:
    config = small_head_config("stageinteractor", backbone_frozen_stages=1, num_levels=2)
    model = SmallSwinDetector(config)
    model.save_pretrained(tmp_path)
    loaded = SmallSwinDetector.from_pretrained(tmp_path)
    assert trained(loaded) == trained(model)
    names = {name for name, _ in model.named_parameters()} - trained(model)
    assert {".".join(name.split(".")[3:5]) for name in names} == {
        "embeddings.patch_embeddings",
        "embeddings.norm",
        "encoder.layers",
    }
