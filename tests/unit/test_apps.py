"""All command lines: their flags, and how soon they answer."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from detrelay.apps import check_data, cli, evaluate, predict, publish, replay

APPS = Path(__file__).parents[2] / "apps"
COMMANDS = sorted(path.stem for path in APPS.glob("*.py"))
SLOW_TO_IMPORT = {
    *("torch", "torchvision", "transformers", "accelerate", "huggingface_hub"),
    *("datasets", "numpy", "scipy", "matplotlib", "pycocotools", "PIL", "pydantic", "tomlkit"),
}


def test_flags_of_the_other_commands_are_frozen() -> None:
    assert [field.name for field in dataclasses.fields(evaluate.Arguments)] == [
        "data", "model", "head", "predictions", "images", "output", "details", "detections",
        "batch_size", "max_detections", "class_agnostic", "backend", "max_pixels", "allow_outside",
        "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(check_data.Arguments)] == [
        "data", "images", "output", "write", "skip_images", "max_pixels", "allow_outside", "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(publish.Arguments)] == [
        "folder", "repo_id", "private", "tag", "license", "head", "dry_run", "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(predict.Arguments)] == [
        "model", "output", "input", "data", "images", "format", "threshold", "top_k", "classes",
        "nms_iou_threshold", "batch_size", "device", "dtype", "threads", "frame_step",
        "max_frames", "tiles", "overlap", "head", "max_pixels", "allow_outside", "debug",
    ]  # fmt: skip
    assert [field.name for field in dataclasses.fields(replay.Arguments)] == ["file", "debug"]


@pytest.mark.parametrize("app", COMMANDS)
def test_help_answers_at_once(app: str) -> None:
    """Without torch and what stands on it, whose imports take longer than one likes to wait."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}))\n"
        f"sys.argv = ['{app}.py', '--help'];\n"
        f"runpy.run_path({str(APPS / app)!r} + '.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, _, modules = done.stdout.rstrip().rpartition("\n")
    assert not SLOW_TO_IMPORT & set(modules.split())
    for field in dataclasses.fields(importlib.import_module(f"detrelay.apps.{app}").Arguments):
        option = f"--{field.name.replace('_', '-')} "
        assert option in shown or f" {field.name.upper()} " in shown


def test_every_command_is_known() -> None:
    """To the program and as a script."""
    assert (
        set(COMMANDS)
        == {name.replace("-", "_") for name in cli.COMMANDS}
        == {
            *("train", "evaluate", "report", "study", "compare", "predict", "publish", "convert"),
            *("cost", "replay", "check_data", "export", "demo"),
        }
    )
