"""Fixtures of several files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from fixed_model import Fixed


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest listens to all loggers, and torch writes its graphs to one that has a listener."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)


@pytest.fixture
def small_and_silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs of the tiny network, on one thread and without pictures, with no precision set yet."""
    # here, so that tests without torch's larger friends do not wait for them
    from accelerate.state import AcceleratorState

    from tiny_run import shrink_backbone, skip_pictures

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _small_swin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Swin-T be a small one."""
    from detrelay.core.backbones import SWINS
    from factories_backbones import SMALL_SWIN

    monkeypatch.setitem(SWINS, "swin_t", SMALL_SWIN)


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The best model of a small run, while ResNets are the tiny one."""
    from hub_model import small_model, write_run
    from tiny_run import shrink_backbone

    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield write_run(tmp_path_factory.mktemp("run"), small_model())


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Fixed:
    """A model that knows its answer, in place of whatever a command loads."""
    from fixed_model import fixed_model

    return fixed_model(monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three photos."""
    from fixed_model import write_photos

    return write_photos(tmp_path / "photos")


@pytest.fixture
def folder(best: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be corrupted; its best model."""
    shutil.copytree(best.parent, tmp_path / "run")
    return tmp_path / "run" / "best"
