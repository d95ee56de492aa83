"""The wheel alone: built, installed into a clean environment, and used outside the clone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tiny_run import TINY

ROOT = Path(__file__).parents[2]
SMALL = (*TINY, "data.num_train=4", "data.num_val=2", "train.epochs=1", "train.batch_size=2")

pytestmark = pytest.mark.slow


def source_of(name: str) -> str:
    """A file that the README shows."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(rf"```python\n(# {name}\n.*?)```", readme, re.DOTALL)
    return str(source)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = ["uv", "build", "--wheel", "--quiet", "--out-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def detrelay(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of an environment with the wheel, next to the libraries of this one."""
    place = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", str(python), str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    (packages,) = place.glob("lib/python*/site-packages")
    # a path line does not process .pth files there, so the clone stays out of reach
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "detrelay"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user works."""
    return tmp_path_factory.mktemp("work")


def run(command: Path, folder: Path, *arguments: str) -> str:
    """Stdout of a command that must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [command, *arguments],
        cwd=folder,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_wheel_holds_the_recipes_and_nothing_of_the_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.name for path in ROOT.glob("apps/src/detrelay/apps/recipes/*.toml")}
    assert recipes == {
        Path(name).name
        for name in names
        if re.fullmatch(r"detrelay/apps/recipes/[^/]+\.toml", name)
    }
    assert any(name.startswith("detrelay/apps/recipes/base/") for name in names)
    assert {name.partition("/")[0] for name in names} == {
        "detrelay",
        f"detrelay-{tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['version']}"
        ".dist-info",
    }


def test_the_program_is_the_wheel_and_not_the_clone(detrelay: Path, folder: Path) -> None:
    code = "import detrelay.apps.train, detrelay.core.boxes as b; print(b.__file__)"
    found = run(detrelay.with_name("python"), folder, "-c", code)
    assert detrelay.parents[1] in Path(found.strip()).parents
    assert " train " in run(detrelay, folder, "--help")


def test_train_and_predict(detrelay: Path, folder: Path) -> None:
    shown = run(detrelay, folder, "train", "--head", "stageinteractor", "--set", *SMALL)
    assert "best model: runs/" in shown
    best = next((folder / "runs").glob("*/best"))
    pictures = best.parent / "pictures"
    arguments = ("--model", str(best), "--input", str(pictures), "--output", "out")
    run(detrelay, folder, "predict", *arguments, "--threshold", "0")
    assert list((folder / "out").glob("*.png"))
    rows = json.loads((folder / "out" / "predictions.json").read_text())
    assert {"bbox", "score", "category"} <= rows[0].keys()


def test_recipes_by_name_and_own_parts_by_file(detrelay: Path, folder: Path) -> None:
    (folder / "my_head.py").write_text(source_of("my_head.py"))
    (folder / "late_boxes.py").write_text(source_of("late_boxes.py"))
    shown = run(detrelay, folder, "train", "--recipe", "shapes_dino", "--dry-run")
    assert 'head = "dino"' in shown
    settings = [entry for entry in SMALL if not entry.startswith("model.")]
    arguments = ("--head", "my_head:MyHeadConfig", "--assigner", "late_boxes:LateBoxesAssigner")
    run(detrelay, folder, "train", *arguments, "--output", "own", "--set", *settings)
    record = json.loads((folder / "own" / "best" / "training.json").read_text())
    assert record["assigner"] == "late_boxes:LateBoxesAssigner"
    assert (
        json.loads((folder / "own" / "best" / "config.json").read_text())["model_type"] == "my_head"
    )
