"""`model.push_to_hub` publishes what the command publishes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForObjectDetection

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.hub.calls import HubError
from hub_model import only_hub, small_model, write_run
from hub_server import USER, HubServer, running_hub
from tiny_run import shrink_backbone

REPOSITORY = f"{USER}/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    shrink_backbone(monkeypatch)
    with running_hub() as server, only_hub(server, tmp_path / "home"):
        yield server


def test_it_publishes_the_folder_it_came_from(hub: HubServer, tmp_path: Path) -> None:
    best = write_run(tmp_path / "run", small_model())
    model = AutoModelForObjectDetection.from_pretrained(best)
    assert model.push_to_hub(REPOSITORY) == f"{hub.url}/{REPOSITORY}"
    files = hub.files(REPOSITORY, "v1")
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "modeling_detrelay.py",
        "preprocessor_config.json", "training.json",
    }  # fmt: skip
    for name in ("model.safetensors", "training.json"):
        assert files[name] == (best / name).read_bytes(), name
    assert json.loads(files["preprocessor_config.json"])["size"]["shortest_edge"] == 64
    assert b"0.4321" in files["README.md"] or b"43.2" in files["README.md"]
    assert hub.count("POST .*/commit/") == 1


def test_figures_of_other_weights_do_not_come_along(hub: HubServer, tmp_path: Path) -> None:
    best = write_run(tmp_path / "run", small_model())
    model = AutoModelForObjectDetection.from_pretrained(best)
    with torch.no_grad():
        model.head.content.weight += 1
    model.push_to_hub(REPOSITORY, license="mit", commit_message="One more step")
    assert hub.repositories[REPOSITORY].messages == ["One more step"]
    files = hub.files(REPOSITORY, "v1")
    assert json.loads(files["training.json"]) == {"init": str(best)}
    assert b"0.4321" not in files["README.md"]
    assert b"43.2" not in files["README.md"]


def test_a_model_made_in_memory_needs_a_processor(hub: HubServer) -> None:
    model = small_model()
    with pytest.raises(HubError, match="no image processor is known; pass processor="):
        model.push_to_hub(REPOSITORY)
    assert hub.count("POST .*/commit/") == 0
    size = {"shortest_edge": 64, "longest_edge": 96}
    model.push_to_hub(REPOSITORY, processor=DetrelayImageProcessor(size=size), private=True)
    assert json.loads(hub.files(REPOSITORY, "v1")["training.json"]) == {}
