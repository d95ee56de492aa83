"""Checkpoints: complete or absent; folders: old or new."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from detrelay.core.engine.checkpoint import (
    CheckpointError,
    RunPosition,
    find_damage,
    load_newest_checkpoint,
    save_checkpoint,
    sha256_of,
)
from detrelay.core.engine.run_folder import checkpoints


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture
def model(accelerator: Accelerator) -> nn.Module:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    return model


def save(accelerator: Accelerator, model: nn.Module, folder: Path, *steps: int) -> None:
    """One checkpoint per step, with weights that encode the step."""
    for step in steps:
        with torch.no_grad():
            model.weight.fill_(step)
        save_checkpoint(accelerator, folder, RunPosition(step=step, epoch=1, batch=2), keep=3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_last_is_loaded(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 5, 10, 10_000_000, 20, 15)
    # by number, not by name or date
    assert [path.name for path in checkpoints(tmp_path)] == [
        "step_0000015", "step_0000020", "step_10000000",
    ]  # fmt: skip
    assert names(tmp_path) == ["step_0000015", "step_0000020", "step_10000000"]
    position = load_newest_checkpoint(accelerator, tmp_path, pytest.fail)
    assert position == RunPosition(step=10_000_000, epoch=1, batch=2)
    assert model.weight.unique().item() == 10_000_000


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("optimizer.bin", cut, "optimizer.bin has "),
        ("model.safetensors", flip, "model.safetensors has changed"),
        ("random_states_0.pkl", flip, "random_states_0.pkl has changed"),
        ("complete.json", Path.unlink, "unreadable: No such file"),
        ("complete.json", cut, "complete.json is not what was written"),
        ("complete.json", lambda path: path.write_text("[]"), "complete.json is not what was"),
        ("complete.json", lambda path: path.write_text("{}"), "complete.json is not what was"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    name: str,
    harm: Callable[[Path], object],
    reason: str,
    accelerator: Accelerator,
    model: nn.Module,
    tmp_path: Path,
) -> None:
    save(accelerator, model, tmp_path, 1, 2)
    harm(tmp_path / "step_0000002" / name)
    said: list[str] = []
    position = load_newest_checkpoint(accelerator, tmp_path, said.append)
    assert position is not None
    assert position.step == 1
    assert model.weight.unique().item() == 1
    assert len(said) == 1
    assert f"step_0000002 is damaged ({reason}" in said[0]
    assert "\n" not in said[0]


def test_if_all_are_damaged_nothing_is_loaded_or_deleted(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 1, 2)
    for checkpoint in checkpoints(tmp_path):
        flip(checkpoint / "model.safetensors")
    with torch.no_grad():
        model.weight.fill_(7)
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        load_newest_checkpoint(accelerator, tmp_path, lambda line: None)
    assert names(tmp_path) == before
    assert model.weight.unique().item() == 7


def test_a_half_written_folder_is_ignored_and_cleared_by_the_next_save(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 1)
    half = tmp_path / ".step_0000002.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    position = load_newest_checkpoint(accelerator, tmp_path, pytest.fail)
    assert position is not None
    assert position.step == 1
    save(accelerator, model, tmp_path, 3)
    assert names(tmp_path) == ["step_0000001", "step_0000003"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 1, 2)
    flip(tmp_path / "step_0000002" / "model.safetensors")
    save(accelerator, model, tmp_path, 2)
    assert find_damage(tmp_path / "step_0000002") is None


def test_no_checkpoint_at_all(accelerator: Accelerator, tmp_path: Path) -> None:
    assert load_newest_checkpoint(accelerator, tmp_path / "none", pytest.fail) is None


def test_every_file_is_listed(accelerator: Accelerator, model: nn.Module, tmp_path: Path) -> None:
    save(accelerator, model, tmp_path, 1)
    folder = tmp_path / "step_0000001"
    listed = json.loads((folder / "complete.json").read_text())["files"]
    assert sorted([*listed, "complete.json"]) == names(folder)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Limit the size of files: the kernel fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# model.safetensors has 136 bytes, optimizer.bin 2 KiB, the random states 14 KiB, the list 1 KiB
@pytest.mark.parametrize("size", [0, 100, 1000, 10_000])
def test_a_full_disk_is_reported_in_one_line_and_harms_nothing(
    size: int,
    full_disk: Callable[[int], None],
    accelerator: Accelerator,
    model: nn.Module,
    tmp_path: Path,
) -> None:
    save(accelerator, model, tmp_path, 1)
    full_disk(size)
    with pytest.raises(CheckpointError, match="step_0000002 cannot be written") as caught:
        save(accelerator, model, tmp_path, 2)
    full_disk(2**30)
    assert "\n" not in str(caught.value)
    assert "MiB are free" in str(caught.value)
    assert names(tmp_path) == ["step_0000001"]
    assert find_damage(tmp_path / "step_0000001") is None
    save(accelerator, model, tmp_path, 3)  # with room it goes on
    assert names(tmp_path) == ["step_0000001", "step_0000003"]


def test_other_faults_of_saving_keep_their_traceback(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: str) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(accelerator, "save_state", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_checkpoint(accelerator, tmp_path, RunPosition(step=1), keep=1)


def test_damaged_checkpoints_do_not_count_and_move_aside(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 2, 4, 6)
    for step in (4, 6):
        flip(tmp_path / f"step_000000{step}" / "model.safetensors")
    said: list[str] = []
    position = RunPosition(step=3)
    save_checkpoint(accelerator, tmp_path, position, keep=2, report=said.append)
    assert names(tmp_path) == [
        "damaged_step_0000004", "damaged_step_0000006", "step_0000002", "step_0000003",
    ]  # fmt: skip
    assert all(find_damage(checkpoint) is None for checkpoint in checkpoints(tmp_path))
    assert [line.split("step_")[1][:7] for line in said] == ["0000004", "0000006"]
    assert "model.safetensors has changed" in said[0]
    assert load_newest_checkpoint(accelerator, tmp_path, pytest.fail) == position


def test_the_one_just_saved_is_kept_next_to_newer_ones(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 4, 6)
    save_checkpoint(accelerator, tmp_path, RunPosition(step=3), keep=1)
    assert names(tmp_path) == ["step_0000003", "step_0000006"]


class Harmful:
    """Unpickled, it would create a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_a_doctored_pickle_is_never_run_and_the_one_before_is_used(
    name: str, accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    folder, trap = tmp_path / "checkpoints", tmp_path / "trap"
    save(accelerator, model, folder, 1, 2)
    torch.save({"state": Harmful(trap)}, folder / "step_0000002" / name)
    marker = folder / "step_0000002" / "complete.json"
    content = json.loads(marker.read_text())
    doctored = folder / "step_0000002" / name
    content["files"][name] = {"size": doctored.stat().st_size, "sha256": sha256_of(doctored)}
    marker.write_text(json.dumps(content))  # with hashes that agree
    said: list[str] = []
    position = load_newest_checkpoint(accelerator, folder, said.append)
    assert not trap.exists()
    assert position is not None
    assert position.step == 1
    assert model.weight.unique().item() == 1
    (line,) = said
    assert "step_0000002 cannot be loaded (not a checkpoint of plain tensors" in line
    assert "weights_only" not in line


def test_a_position_that_holds_no_numbers_is_damage(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 1)
    marker = tmp_path / "step_0000001" / "complete.json"
    marker.write_text(marker.read_text().replace('"epoch": 1', '"epoch": "one"'))
    assert find_damage(marker.parent) == "complete.json is not what was written"


def test_a_checkpoint_between_two_moves_is_found(
    accelerator: Accelerator, model: nn.Module, tmp_path: Path
) -> None:
    save(accelerator, model, tmp_path, 1)
    (tmp_path / "step_0000001").rename(tmp_path / ".step_0000001.old")  # killed while replaced
    save(accelerator, model, tmp_path, 2)
    assert names(tmp_path) == ["step_0000001", "step_0000002"]
