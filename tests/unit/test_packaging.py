"""The layout: one distribution, one namespace, four roots."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import files
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
PARTS = {
    "core": ROOT / "packages" / "core",
    "heads": ROOT / "packages" / "heads",
    "assigners": ROOT / "packages" / "assigners",
    "apps": ROOT / "apps",
}
# modules without a test file of their name, and what tests them instead
TESTED_ELSEWHERE = {
    "core.data.addresses": "test_sources_addresses.py and test_lists.py read from addresses",
    "core.data.formats": "a table of names; test_decode.py reads a file of each",
    "core.engine.parts": "dataclasses without code",
    "core.ops.eager": "test_folded_conv.py takes both ways",
    "core.progress": "one number",
    "core.engine.batches": "test_streaming.py and test_trainer.py take batches of both kinds",
    "core.recipes.data_config": "test_recipe.py and test_augmentation.py reject its settings",
    "apps.export_data": "test_export.py measures AP of both",
    "apps.transformers_stages": "test_recording.py looks at two models of transformers",
    **dict.fromkeys(
        [
            *("apps.report", "apps.report_figures", "apps.report_gallery", "apps.report_page"),
            "apps.report_queries",
        ],
        "tests/integration/test_report.py makes whole reports",
    ),
    **dict.fromkeys(
        [f"apps.writers.{name}" for name in ("base", "crops", "drawings")],
        "test_predict_results.py runs the command and reads what it wrote",
    ),
}


def test_no_root_closes_the_namespace() -> None:
    for part, folder in PARTS.items():
        source = folder / "src" / "detrelay"
        assert source.is_dir()
        assert not (source / "__init__.py").exists()
        assert (source / part / "py.typed").exists()


def test_the_parts_are_one_distribution() -> None:
    assert files("detrelay")
    for part in PARTS:
        __import__(f"detrelay.{part}")


def test_every_module_has_a_test_file_of_its_name() -> None:
    """`test_STEM.py`, or `test_FOLDER_STEM.py` where several modules have that stem."""
    modules = {
        ".".join(path.relative_to(folder / "src" / "detrelay").with_suffix("").parts): path
        for folder in PARTS.values()
        for path in (folder / "src" / "detrelay").rglob("*.py")
        if path.stem != "__init__"
    }
    stems = Counter(path.stem for path in modules.values())
    present = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    without = set()
    for name, path in modules.items():
        allowed = {f"test_{path.parent.name}_{path.stem}.py"}
        if stems[path.stem] == 1:
            allowed.add(f"test_{path.stem}.py")
        if not allowed & present:
            without.add(name)
    assert without == TESTED_ELSEWHERE.keys(), "add a test file, or an entry with the reason"


def test_types_and_assigners_need_torch_only() -> None:
    code = "import detrelay.core.criterion, detrelay.assigners, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "torch" in modules
    assert not modules & {"transformers", "torchvision", "accelerate", "pycocotools", "matplotlib"}


def test_workflows_run_the_developers_commands_on_every_python() -> None:
    test = yaml.safe_load((WORKFLOWS / "test.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = [c.rpartition(" :: ")[2] for c in project["classifiers"] if "Python :: 3." in c]
    assert test["jobs"]["tests"]["strategy"]["matrix"]["python"] == told
    assert project["requires-python"] == f">={told[0]}"
    steps = [step.get("run") for job in test["jobs"].values() for step in job["steps"]]
    for command in ("ruff check .", "mypy", "lint-imports", 'pytest -m "not slow"'):
        assert f"uv run {command}" in steps
    for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"):
        assert yaml.safe_load(path.read_text())


def test_a_release_needs_no_secret() -> None:
    """PyPI trusts the workflow by its identity."""
    text = (WORKFLOWS / "release.yml").read_text()
    release = yaml.safe_load(text)
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert release["permissions"] == {"contents": "read"}
    assert "secrets." not in text
