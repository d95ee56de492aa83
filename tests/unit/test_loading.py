"""A saved model is what it claims to be, or it is rejected."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DetrImageProcessor

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.loading import load_model, load_processor
from detrelay.heads import HEADS
from factories import SMALL_HEADS, small_head_config
from tiny_run import shrink_backbone


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield


@pytest.fixture(scope="module")
def saved(small: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "saved"
    HEADS[SMALL_HEADS["dn_detr"][0]].model(small_head_config("dn_detr")).save_pretrained(folder)
    DetrelayImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    for change, message in (
        ({}, None),
        ({"head.anchors.weight": None}, "1 missing (such as head.anchors.weight)"),
        ({"head.more": torch.zeros(3)}, "1 unknown (such as head.more)"),
        ({"head.anchors.weight": torch.zeros(9, 4)}, "1 of another shape (such as"),
    ):
        changed = {**weights, **change}
        save_file(
            {key: value for key, value in changed.items() if value is not None},
            file,
            metadata={"format": "pt"},
        )
        if message is None:
            load_model(folder, "saved")
            continue
        with pytest.raises(ValueError, match=f"^saved: .*{re.escape(message)}"):
            load_model(folder, "saved")


def test_another_image_processor_is_refused(folder: Path) -> None:
    DetrImageProcessor().save_pretrained(folder)
    with pytest.raises(ValueError, match="image processor is a DetrImageProcessor"):
        load_processor(folder, "saved")


def test_the_code_of_a_folder_is_not_run_and_nobody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", ask)
    config = json.loads((folder / "config.json").read_text())
    foreign = {"AutoConfig": "own.C", "AutoModelForObjectDetection": "own.M"}
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "foreign", "auto_map": foreign})
    )
    (folder / "own.py").write_text("raise AssertionError('run')")
    with pytest.raises(ValueError, match="cannot be loaded as a model: ") as error:
        load_model(folder, "saved")
    assert "trust_remote_code" not in str(error.value)


def test_weights_in_a_pickle_are_not_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded as a model: .*model.safetensors"):
        load_model(folder, "saved")
