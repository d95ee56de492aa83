"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ASSETS = Path(__file__).parent / "assets"
REPOSITORY = Path(__file__).parent.parent

# the test processes share the cores, also with programs that tests start; small tensors do not
# benefit from more threads
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of the small reference files."""
    return ASSETS


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images (bccd, coco_mini, coco_fake100), or skip."""
    folder = Path(os.environ.get("DETRELAY_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real images: no folder {folder} (set DETRELAY_DATA)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that fork first: once autograd has started threads, children cannot train."""
    items.sort(key=lambda item: "test_processes" not in item.nodeid)
