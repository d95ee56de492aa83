"""Converting AdaMixer's released checkpoints to StageInteractor: numbers, and the inverse."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from adamixer_reference import STAGE, STRIDES, adamixer_shapes, adamixer_value, decode
from detrelay.apps.convert import Arguments, convert
from detrelay.core.backbones import ResNetBackbone
from detrelay.core.boxes import cxcywh_to_xyxy
from detrelay.core.structures import FeaturePyramid
from detrelay.heads import StageInteractorForObjectDetection
from detrelay.heads.convert.conversion import (
    Conversion,
    convert_checkpoint,
    convert_state_dict,
    to_official,
)
from detrelay.heads.convert.sizes import VARIANTS
from official import hollow, listed_shapes
from reference import unit

START = "rpn_head.init_proposal_bboxes.weight"
SMALL = {"queries": 12, "dim": 64, "classes": 7, "points": 6, "patterns": 16, "hidden": 96}
SIZES = torch.tensor([[128, 160], [120, 150]])


def released(variant: str) -> dict[str, list[int]]:
    """Shapes by name of a published model; StageInteractor has the same backbones."""
    name = {"r101": "r101_3x", "dx101": "dx101", "swin": "swin_s"}.get(variant.split("_")[0])
    backbone = listed_shapes("stageinteractor", name or "r50_1x", "r50_1x" if name else None)
    channels = (96, 192, 384, 768) if name == "swin_s" else (256, 512, 1024, 2048)
    queries = 300 if variant.endswith("_300") else 100
    own = {key: shape for key, shape in backbone.items() if key.startswith("backbone.")}
    return {**own, **adamixer_shapes(channels, queries)}


@cache
def small_state() -> dict[str, Tensor]:
    """A small model on ResNet-18 as mmdetection writes it."""
    backbone = ResNetBackbone("resnet18", "eval", 1).state_dict()
    shapes = {f"backbone.{key}": list(value.shape) for key, value in backbone.items()}
    shapes |= adamixer_shapes((64, 128, 256, 512), **SMALL)
    return {key: adamixer_value(key, shape) for key, shape in shapes.items()}


def small_levels() -> list[Tensor]:
    return [
        unit(f"feat.adamixer.{stride}", (2, 64, 128 // stride, 160 // stride)).double()
        for stride in STRIDES
    ]


def check_numbers(model: StageInteractorForObjectDetection) -> None:
    """Every stage of a float64 model against the formulas."""
    weights = {key: value.double() for key, value in small_state().items()}
    levels = small_levels()
    pyramid = FeaturePyramid(
        levels=tuple(levels),
        strides=STRIDES,
        valid=tuple(torch.ones(2, *level.shape[2:], dtype=torch.bool) for level in levels),
        image_sizes=SIZES,
    )
    with torch.no_grad():
        (group,) = model.head(pyramid)
        expected = decode(weights, levels, SIZES, groups=4)
    whwh = SIZES.flip(-1).repeat(1, 2)[:, None]
    assert len(group.stages) == len(expected) == 6
    for stage, (logits, boxes) in zip(group.stages, expected, strict=True):
        torch.testing.assert_close(stage.logits, logits, atol=1e-9, rtol=0)
        torch.testing.assert_close(cxcywh_to_xyxy(stage.boxes), boxes / whwh, atol=1e-9, rtol=0)


def check_round_trip(conversion: Conversion) -> None:
    official = small_state()
    assert {theirs for theirs, _ in conversion.used} | {START} == official.keys()
    back = to_official(conversion.state, conversion.config)
    assert back.keys() == official.keys()
    assert all(torch.equal(value, official[key]) for key, value in back.items())


@pytest.mark.parametrize("variant", VARIANTS["adamixer"])
def test_names_and_shapes_of_every_variant(variant: str) -> None:
    shapes = released(variant)
    state = hollow(shapes)
    state[START] = torch.tensor([0.5, 0.5, 1, 1]).expand(shapes[START])

    conversion = convert_state_dict(state)

    assert (conversion.head, conversion.variant) == ("adamixer", variant)
    assert {theirs for theirs, _ in conversion.used} | conversion.dropped.keys() == shapes.keys()
    assert all(why.startswith("table of constants") for why in conversion.dropped.values())
    config = conversion.config
    assert (config.num_groups, config.num_out_points, config.pattern_size) == (4, 128, 1)
    assert (config.num_base_points_first, config.num_base_points) == (32, 32)
    with torch.device("meta"):
        expected = conversion.model(config).state_dict()
    found = {key: value.shape for key, value in conversion.state.items()}
    assert found == {key: value.shape for key, value in expected.items()}
    back = to_official(conversion.state, config)
    assert {key: list(value.shape) for key, value in back.items()} == shapes


def test_groups_and_points_are_read_from_shapes() -> None:
    channels, sizes = (64, 128, 256, 512), {**SMALL, "groups": 2, "heads": 4}
    shapes = adamixer_shapes(channels, **sizes)
    first = adamixer_shapes(channels, **{**sizes, "points": 10})
    shapes |= {key: shape for key, shape in first.items() if key.startswith(STAGE.format(0))}
    backbone = {key: value for key, value in small_state().items() if key.startswith("backbone.")}
    config = convert_state_dict({**backbone, **hollow(shapes), START: small_state()[START]}).config
    assert (config.num_groups, config.num_attention_heads) == (2, 4)
    assert (config.num_base_points_first, config.num_base_points) == (10, 6)


def test_numbers_of_the_released_formulas_and_way_back() -> None:
    conversion = convert_state_dict(small_state())
    assert (conversion.head, conversion.variant) == ("adamixer", None)
    assert (conversion.config.num_groups, conversion.config.num_base_points) == (4, 6)
    model = conversion.model(conversion.config)
    model.load_state_dict(conversion.state)
    check_numbers(model.double().eval())
    check_round_trip(conversion)


def test_file_to_folder_and_back(tmp_path: Path) -> None:
    path, output = tmp_path / "latest.pth", tmp_path / "folder"
    torch.save({"meta": {"epoch": 12}, "state_dict": small_state(), "optimizer": {}}, path)
    assert convert(Arguments(checkpoint=path, output=output, head="adamixer")) == 0
    model = AutoModelForObjectDetection.from_pretrained(output)
    assert isinstance(model, StageInteractorForObjectDetection)
    check_numbers(model.double().eval())
    check_round_trip(convert_checkpoint(path))
    assert AutoImageProcessor.from_pretrained(output).pad_size_divisor == 32


def test_other_first_boxes_are_refused() -> None:
    state = dict(small_state())
    state[START] = state[START].clone()
    state[START][3, 2] = 0.9
    with pytest.raises(ValueError, match=r"bboxes.weight must be 0.5, 0.5, 1, 1 in all of its 12"):
        convert_state_dict(state)


def test_each_other_program_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"not a checkpoint of stageinteractor: it has no roi_h"):
        convert_state_dict(small_state(), "stageinteractor")
    with pytest.raises(ValueError, match=r"not a checkpoint of adamixer: it has no roi_head"):
        convert_state_dict(hollow(listed_shapes("stageinteractor", "r50_1x", None)), "adamixer")


@pytest.mark.parametrize("rows", [5, 100_000])
def test_weights_of_no_possible_size_are_refused(rows: int) -> None:
    state = dict(small_state())
    name = "roi_head.bbox_head.0.sampling_n_mixing.adaptive_mixing.parameter_generator.0.bias"
    state[name] = torch.zeros(rows)
    with pytest.raises(ValueError, match="the entries are not those of the model"):
        convert_state_dict(state)
