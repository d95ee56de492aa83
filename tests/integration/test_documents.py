"""The programs in the documentation run as they stand."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from detrelay.apps.build import build_model, find_recipe
from detrelay.assigners import CrossStageAssigner
from detrelay.core.data.sample import Category
from tiny_run import skip_pictures, tiny_run

DOCS = Path(__file__).parents[2] / "docs"


def programs(name: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_use_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = programs("python.md")
    assert len(blocks) == 3
    assert len([line for line in blocks[0].splitlines() if line]) <= 20
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)
    assert (tmp_path / "runs/notebook/best/model.safetensors").is_file()
    assert (tmp_path / "runs/my_loop/model.safetensors").is_file()
    assert "decoder/0/class" in capsys.readouterr().out


def files(name: str) -> dict[str, str]:
    """The blocks of a page that have a title, by title."""
    text = (DOCS / name).read_text(encoding="utf-8")
    found = re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)
    return dict(found)


def as_settings(table: dict[str, Any], prefix: str = "") -> list[str]:
    """A recipe's tables as --set takes them; options of parts stay tables."""
    settings = []
    for key, value in table.items():
        if isinstance(value, dict) and not prefix:
            settings += as_settings(value, f"{key}.")
        else:
            settings.append(f"{prefix}{key}={_toml(value)}")
    return settings


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of docs/extending.md in the working folder."""
    found = files("extending.md")
    for name, content in found.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in found:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return found


def test_parts_of_ones_own_train_together(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_pictures(monkeypatch)
    for name, content in parts.items():
        if name.endswith(".py"):
            assert len([line for line in content.splitlines() if line]) <= 20, name
    settings = [
        setting
        for name, content in parts.items()
        if name.endswith(".toml")
        for setting in as_settings(tomllib.loads(content))
    ]
    assert len(settings) == 6
    assert tiny_run(tmp_path / "run", "train.epochs=1", *settings) == 0
    best = json.loads((tmp_path / "run/best/training.json").read_text())
    assert list(best["measured"]["stats"]) == ["AP50", "share_sure"]
    config = json.loads((tmp_path / "run/best/config.json").read_text())
    assert config["backbone_name"] == "my_backbone:Steps"
    assert best["recipe"]["data"]["transforms"][2] == {
        "name": "my_transform:Grey",
        "probability": 0.5,
    }


@pytest.mark.usefixtures("parts")
def test_a_head_of_ones_own_learns_by_its_own_losses() -> None:
    sizes = ("d_model=32", "num_queries=4", "encoder_layers=1", "decoder_layers=2", "ffn_dim=32")
    recipe = find_recipe(
        None,
        *(f"model.{size}" for size in sizes),
        "train.backbone_weights=none",
        "model.backbone_name=my_backbone:Steps",
        "model.backbone_options={width=8}",
        "model.num_backbone_levels=2",
        head="my_head:RefinedConfig",
    )
    model = build_model(recipe, [Category(1, "cell"), Category(2, "dust")])
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
    output = model.train()(torch.randn(1, 3, 160, 160), labels=labels)
    criterion: Any = model.loss_function
    assert isinstance(criterion.assigners["decoder"], CrossStageAssigner)
    weights = {"class": 2.0, "l1": 5.0, "giou": 4.0}
    total = sum(weights[key.split("/")[2]] * loss for key, loss in output.loss_dict.items())
    torch.testing.assert_close(output.loss, total)
