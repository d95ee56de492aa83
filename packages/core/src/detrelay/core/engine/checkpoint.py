"""Checkpoints that survive a kill at any moment, and folders that are replaced in one move."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from detrelay.core.errors import one_line

_MARKER = "complete.json"
_NAME = re.compile(r"step_(\d{7,})")
_PARTIAL = ".partial"
# torch.save has no exception of its own for a full disk
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


class CheckpointError(ValueError):
    """No checkpoint can be resumed from."""


@dataclass
class RunPosition:
    """Where a run stands, between two steps.

    Attributes:
        step: optimiser steps done.
        epoch: epoch that is being trained, from 0.
        batch: steps of that epoch already done.
        best_ap: highest AP evaluated before this position; -1 before the first.
        best_step: step of that evaluation; -1 before the first.
        stale: evaluations since the best one.
        images_per_step: images of one step over all processes and accumulated batches.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_ap: float = -1.0
    best_step: int = -1
    stale: int = 0
    images_per_step: int = 0


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    position: RunPosition,
    keep: int,
    *,
    on_each_node: bool = False,
) -> Path:
    """Write the whole training state; to be called by every process.

    The state goes into a sibling folder, gets a list of its files with their hashes, reaches the
    disk, and only then takes its final name. Older checkpoints beyond `keep` are removed last.

    Args:
        accelerator: holds model, optimiser and scaler.
        folder: the folder of all checkpoints.
        position: stored with the state.
        keep: how many of the newest stay.
        on_each_node: every machine writes all of it, because they share no disk.

    Raises:
        CheckpointError: the disk is full or refuses; what was there before is untouched.
    """
    target = folder / f"step_{position.step:07d}"
    partial = folder / f".{target.name}{_PARTIAL}"
    writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
    accelerator.project_configuration.save_on_each_node = on_each_node
    try:
        with written_together(accelerator, target):
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        hook = accelerator.register_save_state_pre_hook(_save_bare_weights)
        with written_together(accelerator, target):
            accelerator.save_state(str(partial))
        hook.remove()
        with written_together(accelerator, target):
            if writes:
                _seal(partial, position)
                replace_folder(partial, target)
                _prune(folder, keep)
    except CheckpointError:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


@contextmanager
def written_together(accelerator: Accelerator, target: Path) -> Iterator[None]:
    """Wait until every process has written its part; if one could not, all raise.

    Raises:
        CheckpointError: in one line, what could not be written and how much room is left.
    """
    problem: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = error
    except RuntimeError as error:
        if not any(word in str(error) for word in _TORCH_CANNOT_WRITE):
            raise
        problem = error
    reasons = gather_object([None if problem is None else one_line(problem)])
    for process, reason in enumerate(reasons):
        if reason is not None:
            folder = next(path for path in target.parents if path.exists())
            free = shutil.disk_usage(folder).free / 2**20
            raise CheckpointError(
                f"{target} cannot be written (process {process}: {reason}; {free:.0f} MiB are "
                f"free on this disk); the checkpoints before it are whole: make room and --resume"
            ) from problem


def load_newest_checkpoint(
    accelerator: Accelerator, folder: Path, report: Callable[[str], None]
) -> RunPosition | None:
    """Restore the newest checkpoint that is whole; to be called by every process.

    Args:
        accelerator: holds the prepared model, optimiser and scaler to fill.
        folder: the folder of all checkpoints; the main process says which there are, and every
            machine must find them under this name.
        report: told in one line about each damaged checkpoint that is passed over.

    Returns:
        The stored position, or None where no checkpoint was ever completed.

    Raises:
        CheckpointError: there are checkpoints and all are damaged; nothing is deleted.
    """
    found: list[Any] = [[path.name for path in checkpoints(folder)]]
    broadcast_object_list(found)
    candidates = [folder / name for name in found[0]]
    for candidate in reversed(candidates):
        own = find_damage(candidate) if accelerator.is_local_main_process else None
        problems = gather_object([own])
        damaged = next((rank for rank, problem in enumerate(problems) if problem is not None), None)
        if damaged is not None:
            where = "" if damaged == 0 else f" as process {damaged} sees it"
            report(
                f"checkpoint {candidate} is damaged{where} ({problems[damaged]}); "
                f"trying the one before"
            )
            continue
        hook = accelerator.register_load_state_pre_hook(_load_bare_models)
        accelerator.load_state(str(candidate))
        hook.remove()
        return RunPosition(**json.loads((candidate / _MARKER).read_text())["position"])
    if candidates:
        raise CheckpointError(
            f"{folder}: all {len(candidates)} checkpoints are damaged; start again with another "
            f"--output, or give --init a saved model folder (several machines need a shared disk, "
            f"or train.save_on_each_node from the start)"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under their final names, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint in a few words, None if it is whole."""
    try:
        content = json.loads((checkpoint / _MARKER).read_text(encoding="utf-8"))
        RunPosition(**content["position"])
        for name, facts in content["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['size']}"
            if sha256_of(path) != facts["sha256"]:
                return f"{name} has changed"
    except OSError as error:
        return f"unreadable: {error.strerror or error}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{_MARKER} is not what was written"
    return None


def save_model(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    record: Mapping[str, Any],
    target: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, under its name only when it is whole.

    Args:
        model: the bare model, without wrappers.
        processor: its image processor.
        record: facts of the training or the conversion, stored beside as `training.json`.
        target: the folder; one of that name is replaced.
        weights: gathered ones, where the model itself holds only a share of them.
    """
    aside = target.with_name(f".{target.name}{_PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)
        (aside / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        replace_folder(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Give a finished folder its name; an older folder of that name goes.

    Both names lie in one folder. A kill leaves the old or the new folder, whole, under `target`
    or, between the two moves, under the name that `recover_folder` knows.
    """
    recover_folder(target)
    old = _old_name(target)
    if target.exists():
        target.rename(old)
    source.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Finish a replacement that a kill has interrupted."""
    old = _old_name(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def sha256_of(path: Path) -> str:
    """The hash of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_bare_weights(
    models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
) -> None:
    """Name the weights as without a wrapper, so that any number of processes can resume."""
    for model, state in zip(models, weights, strict=False):  # sharded models come without
        if isinstance(model, DistributedDataParallel):
            for key in list(state):
                state[key.removeprefix("module.")] = state.pop(key)


def _load_bare_models(models: list[nn.Module], folder: str) -> None:
    for index, model in enumerate(models):
        if isinstance(model, DistributedDataParallel):
            models[index] = model.module


def _old_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _seal(folder: Path, position: RunPosition) -> None:
    """List the files with size and hash, and bring all of it to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    marker = folder / _MARKER
    marker.write_text(json.dumps({"position": asdict(position), "files": files}, indent=1))
    _sync(marker)
    _sync(folder)


def _prune(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    for leftover in folder.glob(".step_*"):  # of saves that a kill has interrupted
        shutil.rmtree(leftover)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
