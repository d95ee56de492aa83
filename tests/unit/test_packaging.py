"""The layout: one distribution, one namespace, four roots."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = {
    "core": ROOT / "packages" / "core",
    "heads": ROOT / "packages" / "heads",
    "assigners": ROOT / "packages" / "assigners",
    "apps": ROOT / "apps",
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


def test_types_and_assigners_need_torch_only() -> None:
    code = "import detrelay.core.criterion, detrelay.assigners, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "torch" in modules
    assert not modules & {"transformers", "torchvision", "accelerate", "pycocotools", "matplotlib"}
