"""What the README shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import tyro
from PIL import Image
from transformers import AutoConfig, AutoModelForObjectDetection

import train
from detrelay.assigners import ASSIGNERS
from tiny_run import TINY, shrink_backbone, skip_pictures, tiny_run

README = Path(__file__).parents[2] / "README.md"
DATA_AND_SCHEDULE = [entry for entry in TINY if not entry.startswith("model.")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def python_file(name: str) -> str:
    (found,) = [block for block in blocks("python") if block.startswith(f"# {name}\n")]
    return found


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.partition(" #")[0].strip() for line in lines if "apps/" in line]


@pytest.fixture(autouse=True)
def small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[None]:
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("my_head", None)


def test_there_are_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_commands_name_options_and_recipes_that_exist(command: str) -> None:
    app, _, rest = command[command.index("apps/") + len("apps/") :].partition(".py")
    module = import_module(app)
    arguments = tyro.cli(module.Arguments, args=shlex.split(rest))
    if app == "train":
        assert train.resolve(arguments).head


def test_own_head_trains_and_loads(tmp_path: Path) -> None:
    (tmp_path / "my_head.py").write_text(python_file("my_head.py"))
    (line,) = [command for command in commands() if "my_head:" in command]
    arguments = tyro.cli(train.Arguments, args=shlex.split(line.partition("train.py")[2]))
    settings = [entry for group in arguments.set for entry in group]
    options = {"head": arguments.head, "assigner": arguments.assigner, "recipe": None}
    tiny = [*settings, *DATA_AND_SCHEDULE]
    resolved = train.Arguments(output=tmp_path / "run", set=(tuple(tiny),), **options)
    assert train.train(resolved) == 0
    assert AutoConfig.from_pretrained(tmp_path / "run" / "last").model_type == "my_head"
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run" / "last").eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).pred_boxes.shape == (1, 20, 4)


def test_own_assigner_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, type] = {}
    exec(python_file("late_boxes.py"), names)
    monkeypatch.setitem(ASSIGNERS, "late_boxes", names["LateBoxesAssigner"])
    assert tiny_run(tmp_path / "run", "assigner.options.stage=1", assigner="late_boxes") == 0


def test_snippet_finds_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny_run(tmp_path / "runs" / "stageinteractor-cross_stage", "train.epochs=1") == 0
    Image.new("RGB", (70, 50)).save(tmp_path / "image.jpg")
    (snippet,) = [block for block in blocks("python") if "pipeline(" in block]
    capsys.readouterr()
    exec(snippet.replace("threshold=0.5", "threshold=0.0"), {})
    assert len(capsys.readouterr().out.splitlines()) > 3
