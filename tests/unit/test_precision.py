from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from detrelay.core.engine.precision import allow_tf32, precision_note
from tiny_run import shrink_backbone, tiny_run


@pytest.fixture
def state_of_its_own() -> Iterator[None]:
    """Accelerate keeps one precision a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def accelerator(precision: str, device: str = "cpu") -> Any:
    return SimpleNamespace(device=torch.device(device), mixed_precision=precision)


@pytest.mark.parametrize(
    ("precision", "device", "supported", "noted"),
    [
        ("bf16", "cpu", False, True),
        ("bf16", "cpu", True, False),
        ("no", "cpu", False, False),
        ("bf16", "cuda", False, False),
    ],
)
def test_slow_bfloat16_is_noted(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, supported: bool, noted: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert (precision_note(accelerator(precision, device)) is not None) == noted


def test_a_recipe_says_whether_tf32_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    shrink_backbone(monkeypatch)
    try:
        allow_tf32(False)
        assert tiny_run(tmp_path / "run", "train.epochs=1", "train.tf32=true") == 0
        assert [place.allow_tf32 for place in places] == [True, True]
        allow_tf32(None)
        assert [place.allow_tf32 for place in places] == [True, True]
        allow_tf32(False)
        assert [place.allow_tf32 for place in places] == [False, False]
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


@pytest.mark.usefixtures("state_of_its_own")
@pytest.mark.parametrize("dry_run", [False, True])
def test_the_note_comes_before_training_and_with_the_plan(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dry_run: bool,
) -> None:
    shrink_backbone(monkeypatch)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    settings = ("train.mixed_precision=bf16", "train.epochs=1")
    assert tiny_run(tmp_path / "run", *settings, dry_run=dry_run) == 0
    assert "train.mixed_precision=no is the faster choice here" in capsys.readouterr().out
