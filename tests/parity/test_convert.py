"""Converting released checkpoints: names, shapes, numbers, and the inverse."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from deformable_reference import SMALL
from detrelay.apps.convert import Arguments, convert
from detrelay.core.structures import FeaturePyramid
from detrelay.heads import HEADS
from detrelay.heads.convert.conversion import convert_checkpoint, convert_state_dict, to_official
from official import (
    FOLDER,
    LISTED,
    all_shapes,
    hollow,
    listed_shapes,
    manifest,
    shallow,
    with_second_names,
)
from reference import deformable_images, deformable_value, stageinteractor_value, unit

STRIDES = (4, 8, 16, 32)
QUICK = ("base", "dx101_300", "swin_s_300")


def parts_never_read(config: Any) -> int:
    """Number of released parameters that affect no output and that ours lacks."""
    if config.model_type.endswith("stageinteractor"):
        return 328_960  # scores that are the softmax of one number
    return 256 if config.model_type.endswith("dino") else 0  # one label more than there are classes


@pytest.mark.parametrize(
    "listed",
    [
        pytest.param(
            listed,
            id="-".join(listed[:2]),
            marks=() if listed[1] in QUICK else pytest.mark.slow,
        )
        for listed in LISTED
    ],
)
def test_names_and_shapes_of_every_variant(listed: tuple[str, str, str, str | None]) -> None:
    head, variant, name, base = listed
    shapes = all_shapes(head, name, base)
    facts = manifest(head)[name]
    # lists without a count name each entry, but only once
    assert len(shapes) == facts.get("n_state_dict", len(listed_shapes(head, name, base)))

    conversion = convert_state_dict(hollow(shapes))

    assert (conversion.head, conversion.variant) == (head, variant)
    assert {theirs for theirs, _ in conversion.used} | conversion.dropped.keys() == shapes.keys()
    with torch.device("meta"):
        model = HEADS[head].model(conversion.config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in conversion.state.items()} == expected
    back = to_official(conversion.state, conversion.config)
    gone = {
        key
        for key, reason in conversion.dropped.items()
        if not reason.startswith(("another name", "table of constants"))
    }
    assert {key: list(value.shape) for key, value in back.items()} == {
        key: shape for key, shape in shapes.items() if key not in gone
    }

    spare = parts_never_read(conversion.config)
    fixed = sum(
        p.numel() for name, p in model.named_parameters()
        if conversion.config.backbone_norm == "frozen" and name.startswith("backbone.")
        and (".bn" in name or ".downsample.1." in name)
    )  # fmt: skip
    total = facts.get("num_parameters", facts.get("n_parameters"))
    assert sum(p.numel() for p in model.parameters()) - fixed + spare == total
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained + spare == facts.get("num_trainable", facts.get("n_trainable"))


@pytest.mark.slow
def test_variants_that_no_list_names() -> None:
    shapes = all_shapes("stageinteractor", "r50_1x", None)
    shapes["rpn_head.init_content_features.weight"] = [300, 256]
    assert convert_state_dict(hollow(shapes)).variant == "r50_300"
    shapes = all_shapes("stageinteractor", "r101_3x", "r50_1x")
    shapes["rpn_head.init_content_features.weight"] = [300, 256]
    assert convert_state_dict(hollow(shapes)).variant == "r101_300"


def stageinteractor_file(path: Path) -> dict[str, Tensor]:
    """A small StageInteractor as mmdetection writes it."""
    entries = {
        key: (shape, ".bn" in key or "downsample.1." in key)
        for key, shape in listed_shapes("stageinteractor", "r50_1x", None).items()
        if key.startswith("backbone.")
    }
    for key, (shape, kind, _) in manifest("stageinteractor")["tiny"]["keys"].items():
        entries[key] = (shape, kind == "norm")
    state = {
        key: stageinteractor_value(key, tuple(shape), norm and key.endswith(".weight"))
        for key, (shape, norm) in entries.items()
    }
    meta = {"epoch": 12, "mmcv_version": "1.3.3", "CLASSES": ("person",)}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}}}, path)
    return state


@pytest.mark.slow
def test_stageinteractor_file_to_folder_and_back(tmp_path: Path) -> None:
    path, output = tmp_path / "latest.pth", tmp_path / "folder"
    official = stageinteractor_file(path)
    assert convert(Arguments(checkpoint=path, output=output, head="stageinteractor")) == 0

    model = AutoModelForObjectDetection.from_pretrained(output).double().eval()
    assert (model.config.num_queries, model.config.num_labels) == (12, 7)
    levels = [
        unit(f"feat.tiny.{i}", (2, 64, 256 // stride, 320 // stride)).double()
        for i, stride in enumerate(STRIDES)
    ]
    pyramid = FeaturePyramid(
        levels=tuple(levels),
        strides=STRIDES,
        valid=tuple(torch.ones(2, *level.shape[2:], dtype=torch.bool) for level in levels),
        image_sizes=torch.tensor([[256, 320], [240, 300]]),
    )
    with torch.no_grad():
        (group,) = model.head(pyramid)
    expected = load_file(FOLDER / "stageinteractor" / "tiny_forward.safetensors")
    for index, stage in enumerate(group.stages):
        wanted = expected[f"f64.stage{index}.cls_logits"]
        torch.testing.assert_close(stage.logits, wanted, atol=1e-9, rtol=0)

    conversion = convert_checkpoint(path)
    back = to_official(conversion.state, conversion.config)
    assert back.keys() | conversion.dropped.keys() == official.keys()
    assert all(torch.equal(value, official[key]) for key, value in back.items())
    processor = AutoImageProcessor.from_pretrained(output)
    assert processor.pad_size_divisor == 32
    assert dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}


SMALL_DEPTHS = {"base": (2, 3), "two_stage": (2, 4), "r50_4scale": (2, 3)}
QUERIES = {
    "query_embed.weight": [24, 512],
    "transformer.tgt_embed.weight": [40, 256],
}


def deformable_file(head: str, variant: str, path: Path) -> dict[str, Tensor]:
    """A shallow model as Deformable DETR and DINO write it, with the arguments of the run."""
    encoder, decoder = SMALL_DEPTHS[variant]
    shapes = shallow(listed_shapes(head, variant, None), encoder, decoder)
    entries = {
        key: deformable_value(key, QUERIES.get(key, shape)).float() for key, shape in shapes.items()
    }
    state = with_second_names(entries, head, variant, decoder)
    arguments = argparse.Namespace(lr=2e-4, masks=False, dataset_file="coco")
    torch.save({"model": state, "epoch": 49, "args": arguments}, path)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "variant", "file"),
    [
        ("deformable_detr", "base", "base_small"),
        ("deformable_detr", "two_stage", "two_stage_small"),
        ("dino", "r50_4scale", "small_eval"),
    ],
)
def test_deformable_files_to_folders_and_back(
    head: str, variant: str, file: str, tmp_path: Path
) -> None:
    path, output = tmp_path / "checkpoint.pth", tmp_path / "folder"
    official = deformable_file(head, variant, path)
    assert convert(Arguments(checkpoint=path, output=output, variant=variant)) == 0
    model = AutoModelForObjectDetection.from_pretrained(output).double().eval()
    if variant == "two_stage":  # the released file does not record it
        assert model.config.num_queries == 300
        model.head.num_queries = 24
    with torch.no_grad():
        found = model(*deformable_images(*SMALL))
    expected = load_file(FOLDER / head / f"{file}.safetensors")
    logits, boxes = expected["pred_logits"][-1].double(), expected["pred_boxes"][-1].double()
    torch.testing.assert_close(found.logits, logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.pred_boxes, boxes, atol=3e-6, rtol=0)
    assert model.config.id2label[1] == "person"
    assert model.config.category_ids == list(range(91))
    assert AutoImageProcessor.from_pretrained(output).pad_size_divisor == 1

    conversion = convert_checkpoint(path)
    back = to_official(conversion.state, conversion.config)
    assert back.keys() == official.keys()
    for key, value in back.items():
        if key == "label_enc.weight":  # its last row is unused
            value, official[key] = value[:-1], official[key][:-1]
        assert torch.equal(value, official[key]), key
