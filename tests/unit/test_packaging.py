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


def imported_by(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_types_and_assigners_need_torch_only() -> None:
    modules = imported_by("import detrelay.core.criterion, detrelay.assigners")
    assert "torch" in modules
    assert not modules & {"transformers", "torchvision", "accelerate", "pycocotools", "matplotlib"}


def test_inference_needs_neither_evaluation_nor_plotting() -> None:
    modules = imported_by("import detrelay.heads")
    assert not modules & {"pycocotools", "matplotlib", "tyro", "detrelay.assigners"}
