"""The Hugging Face side: saving, loading, Auto classes, pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    pipeline,
)

import detrelay.heads  # registers the Auto classes  # noqa: F401
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.heads import HEADS, StageInteractorConfig, StageInteractorForObjectDetection
from factories import small_config

SIZE = {"shortest_edge": 64, "longest_edge": 96}


def make_model(**changes: Any) -> StageInteractorForObjectDetection:
    torch.manual_seed(0)
    model = StageInteractorForObjectDetection(small_config(**changes))
    for name, parameter in model.named_parameters():
        if parameter.abs().sum() == 0:  # otherwise many paths would be silent
            torch.nn.init.normal_(parameter, std=0.05)
        assert torch.isfinite(parameter).all(), name
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model = make_model(
        id2label={0: "car", 1: "dog", 2: "cat", 3: "cup"},
        category_ids=[3, 18, 17, 47],
    )
    model.save_pretrained(path)
    DetrelayImageProcessor(size=SIZE).save_pretrained(path)
    return path


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def test_round_trip_keeps_weights_and_outputs(folder: Path) -> None:
    loaded = AutoModelForObjectDetection.from_pretrained(folder)
    assert type(loaded) is StageInteractorForObjectDetection
    original = make_model()
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for key, value in original.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    with torch.no_grad():
        ours, theirs = original(pixels()), loaded(pixels())
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.pred_boxes, theirs.pred_boxes)
    assert ours.groups is None


def test_auto_config_keeps_every_field(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is StageInteractorConfig
    assert config.id2label == {0: "car", 1: "dog", 2: "cat", 3: "cup"}
    assert config.category_ids == [3, 18, 17, 47]
    expected = small_config().to_dict()
    loaded = config.to_dict()
    skipped = {"id2label", "label2id", "category_ids", "architectures", "dtype", "_name_or_path"}
    assert {k: loaded[k] for k in expected if k not in skipped} == {
        k: v for k, v in expected.items() if k not in skipped
    }


def test_unknown_key_in_a_saved_config_is_refused(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    data["num_querys"] = 3
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no option 'num_querys'; did you mean 'num_queries'"):
        AutoConfig.from_pretrained(tmp_path)


def test_auto_image_processor(folder: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is DetrelayImageProcessor
    assert processor.size.shortest_edge == 64


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_gives_labelled_boxes(folder: Path, batch_size: int) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)) for _ in range(3)]
    detector = pipeline("object-detection", model=str(folder), device="cpu")
    results = detector(images, threshold=0.0, batch_size=batch_size)
    assert len(results) == 3
    for result in results:
        assert result
        assert {row["label"] for row in result} <= {"car", "dog", "cat", "cup"}
        assert set(result[0]["box"]) == {"xmin", "ymin", "xmax", "ymax"}


@pytest.mark.slow
def test_one_import_registers_and_needs_neither_evaluation_nor_plotting(folder: Path) -> None:
    code = (
        "import detrelay.heads, sys; from transformers import AutoModelForObjectDetection as A; "
        "print(type(A.from_pretrained(sys.argv[1])).__name__, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    name, *modules = done.stdout.split()
    assert name == "StageInteractorForObjectDetection"
    assert not {"pycocotools", "matplotlib", "tyro", "detrelay.assigners"} & set(modules)


def test_other_classes_reinitialise_the_class_scores_only(folder: Path) -> None:
    model = StageInteractorForObjectDetection.from_pretrained(
        folder, config=small_config(num_labels=2), ignore_mismatched_sizes=True
    )
    original = make_model().state_dict()
    changed = [
        name
        for name, value in model.state_dict().items()
        if value.shape != original[name].shape or not torch.equal(value, original[name])
    ]
    assert changed
    assert all(".classify.out." in name for name in changed)
    for stage in model.head.stages:
        # the new scores start at the prior, not at the library's default
        assert torch.all(stage.classify.out.bias == -4.59511985013459)


def test_groups_come_in_training_only_and_norms_stay_fixed() -> None:
    model = make_model(backbone_norm="eval").train()
    before = model.backbone.bn1.running_mean.clone()
    output = model(pixels())
    assert output.groups is not None
    assert len(output.groups[0].stages) == 4
    assert torch.equal(output.logits, output.groups[0].stages[-1].logits)
    assert torch.equal(model.backbone.bn1.running_mean, before)


def test_result_does_not_depend_on_padding_or_neighbours() -> None:
    model = make_model(backbone_norm="eval").double()
    image = pixels()[:1, :, :64, :64].double()
    padded = torch.nn.functional.pad(image, (0, 32))
    mask = torch.nn.functional.pad(torch.ones(1, 64, 64), (0, 32)).long()
    other = pixels(1)[:1].double()
    with torch.no_grad():
        alone = model(padded, mask)
        batch = model(torch.cat([other, padded]), torch.cat([torch.ones_like(mask), mask]))
    torch.testing.assert_close(alone.logits[0], batch.logits[1], atol=1e-9, rtol=0)
    torch.testing.assert_close(alone.pred_boxes[0], batch.pred_boxes[1], atol=1e-9, rtol=0)


def test_boxes_are_units_of_the_unpadded_image() -> None:
    torch.manual_seed(0)
    model = StageInteractorForObjectDetection(small_config()).eval()  # boxes stay whole images
    mask = torch.zeros(1, 64, 96, dtype=torch.long)
    mask[:, :40, :70] = 1
    with torch.no_grad():
        output = model(pixels()[:1], mask)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand_as(output.pred_boxes)
    torch.testing.assert_close(output.pred_boxes, whole)


def test_bfloat16_autocast_keeps_boxes_in_float32() -> None:
    model = make_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels())
    assert output.pred_boxes.dtype == torch.float32
    exact = model(pixels())
    assert (output.pred_boxes - exact.pred_boxes).abs().max() < 0.1


def test_unknown_forward_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="pixel_valves"):
        make_model()(pixel_valves=pixels())


def test_heads_table_names_the_published_assigners() -> None:
    for entry in HEADS.values():
        assert entry.model.config_class is entry.config
    assert {name: entry.assigner for name, entry in HEADS.items()} == {
        "stageinteractor": "cross_stage",
        "deformable_detr": "hungarian",
        "dn_detr": "hungarian",
        "dino": "hungarian",
    }
