"""The command publishes converted models and models with custom heads."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro
from huggingface_hub import ModelCard
from transformers import AutoModelForObjectDetection

from detrelay.apps import convert, publish
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.engine.checkpoint import save_model
from hub_model import only_hub
from hub_server import USER, HubServer, running_hub
from official import write_small_checkpoint
from tiny_run import TinyBlocks, shrink_backbone

README = Path(__file__).parents[2] / "README.md"
REPOSITORY = f"{USER}/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    shrink_backbone(monkeypatch, TinyBlocks)
    monkeypatch.chdir(tmp_path)
    with running_hub() as server, only_hub(server, tmp_path / "home"):
        yield server


def command(*arguments: str) -> int:
    return publish.publish(tyro.cli(publish.Arguments, args=arguments))


def section(card: str, title: str) -> str:
    return card.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_converted_model_says_where_it_came_from_and_nothing_else(hub: HubServer) -> None:
    write_small_checkpoint(Path("released.pth"))
    arguments = convert.Arguments(checkpoint=Path("released.pth").resolve(), output=Path("mine"))
    assert convert.convert(arguments) == 0
    assert command("mine", "model", "--private") == 0
    files = hub.files(REPOSITORY, "v1")
    card = files["README.md"].decode()

    digest = hashlib.sha256(Path("released.pth").read_bytes()).hexdigest()
    origin = section(card, "Origin")
    assert "Converted, not trained here." in origin
    for row in (
        "| head | `detrelay_deformable_detr` |",
        "| backbone | `resnet18` |",
        "| converted from the file | `released.pth` |",
        f"| its sha256 | `{digest}` |",
        "| written by | `fundamentalvision/Deformable-DETR` |",
        "| variant | `base` |",
    ):
        assert row in origin
    assert "converted from a checkpoint of `fundamentalvision/Deformable-DETR`" in card
    assert "zhu2021deformable" in card
    assert "Weights: not stated; look at where they come from." in card
    # nothing is known about training, and models of these sizes were never published
    assert "## Training" not in card
    for word in ("epochs", "seed", "hardware", "command", "assigner", "started from", "Published"):
        assert word not in card
    data = ModelCard(card).data
    assert (data.license, data.eval_results, data.metrics) == ("unknown", None, None)
    assert set(data.tags) == {"detrelay", "detr", "deformable_detr"}
    for name in ("README.md", "training.json"):
        assert str(Path.cwd()) not in files[name].decode()

    model = AutoModelForObjectDetection.from_pretrained(REPOSITORY)
    assert model.config.id2label[1] == "person"


def test_an_own_head_is_published_by_its_name(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = re.findall(r"```python\n(# my_head.py\n.*?)```", README.read_text(), re.DOTALL)
    # under another name, so that no other test has registered it
    Path("unheard.py").write_text(source.replace('"my_head"', '"unheard"'))
    monkeypatch.syspath_prepend(tmp_path)
    unheard = import_module("unheard")
    config = unheard.MyHeadConfig(num_labels=3, backbone_name="resnet18")
    model = unheard.MyHeadForObjectDetection(config)
    save_model(model, DetrelayImageProcessor(), {}, Path("mine"))
    sys.modules.pop("unheard")

    with pytest.raises(ValueError, match="register its head first"):
        command("mine", "model")
    assert hub.repositories == {}
    assert command("mine", "model", "--head", "unheard:MyHeadConfig") == 0
    files = hub.files(REPOSITORY, "v1")
    assert b"from unheard import MyHeadForObjectDetection" in files["modeling_detrelay.py"]
    assert b"The paper of this method is not known to the program." in files["README.md"]
    found = AutoModelForObjectDetection.from_pretrained(REPOSITORY)
    assert type(found).__name__ == "MyHeadForObjectDetection"
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
