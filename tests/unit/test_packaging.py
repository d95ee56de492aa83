"""The layout: one distribution, one namespace, three roots."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("core", "heads", "assigners")


def test_no_root_closes_the_namespace() -> None:
    for part in PARTS:
        source = ROOT / "packages" / part / "src" / "detrelay"
        assert source.is_dir()
        assert not (source / "__init__.py").exists()
        assert (source / part / "py.typed").exists()


def test_three_parts_are_one_distribution() -> None:
    assert files("detrelay")
    for part in PARTS:
        __import__(f"detrelay.{part}")


def test_types_and_assigners_need_torch_only() -> None:
    code = "import detrelay.core.criterion, detrelay.assigners, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "torch" in modules
    assert not modules & {"transformers", "torchvision", "accelerate", "pycocotools", "matplotlib"}
