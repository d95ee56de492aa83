"""Checkpoints that survive a kill at any moment, and the folders of saved models."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, load
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from detrelay.core.engine.atomic_folder import (
    aside_of,
    recover_all,
    remove,
    replace,
    sync,
    write_text,
    written_aside,
)
from detrelay.core.engine.run_folder import MARKER, checkpoints, read_marker, write_record
from detrelay.core.errors import one_line

_MAX_REASON = 300  # characters of another library's message
# torch.save has no specific exception for a full disk
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


class CheckpointError(ValueError):
    """There is no checkpoint to resume from."""


@dataclass
class RunPosition:
    """Where a run stands, between two steps.

    Attributes:
        step: optimiser steps done.
        epoch: current epoch, from 0.
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
    record: Mapping[str, Any] | None = None,
    on_each_node: bool = False,
    report: Callable[[str], None] = print,
) -> Path:
    """Write the whole training state; to be called by every process.

    The state is written to a sibling folder with a list of its files and hashes, synced to disk,
    and only then renamed. Complete checkpoints beyond `keep` are removed last; damaged ones do not
    count and are moved aside.

    Args:
        accelerator: holds model, optimiser and scaler.
        folder: the folder of all checkpoints.
        position: stored with the state.
        keep: how many of the newest complete ones to keep.
        record: facts of the run, stored with the state.
        on_each_node: every machine writes all of it, for machines that share no disk.
        report: called with one line for each damaged checkpoint, on the processes that write.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is untouched.
    """
    target = folder / f"step_{position.step:07d}"
    partial = aside_of(target)
    writes = accelerator.is_local_main_process if on_each_node else accelerator.is_main_process
    accelerator.project_configuration.save_on_each_node = on_each_node
    try:
        with written_together(accelerator, target):
            if writes:
                recover_all(folder)
                partial.mkdir(parents=True)
        hook = accelerator.register_save_state_pre_hook(_save_bare_weights)
        try:
            with written_together(accelerator, target):
                accelerator.save_state(str(partial))
        finally:
            hook.remove()
        with written_together(accelerator, target):
            if writes:
                _seal(partial, position, record)
                replace(partial, target)
                _prune(folder, target, keep, report)
    except CheckpointError:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


@contextmanager
def written_together(accelerator: Accelerator, target: Path) -> Iterator[None]:
    """Wait until every process has written its part; if one could not, all of them raise.

    Raises:
        CheckpointError: in one line, what could not be written and how much space is left.
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
                f"free on this disk); earlier checkpoints are intact: free some space and --resume"
            ) from problem


def load_newest_checkpoint(
    accelerator: Accelerator, folder: Path, report: Callable[[str], None]
) -> RunPosition | None:
    """Restore the newest complete checkpoint; to be called by every process.

    Args:
        accelerator: holds the prepared model, optimiser and scaler to fill.
        folder: the folder of all checkpoints; the main process lists them, and every machine must
            find them under this name.
        report: called with one line for each damaged checkpoint that is skipped.

    Returns:
        The stored position, or None if no checkpoint was ever completed.

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
                f"trying the previous one"
            )
            continue
        problems = gather_object([_load_state(accelerator, candidate)])
        failed = next((problem for problem in problems if problem is not None), None)
        if failed is not None:
            report(f"checkpoint {candidate} cannot be loaded ({failed}); trying the previous one")
            continue
        return _position(read_marker(candidate))
    if candidates:
        raise CheckpointError(
            f"{folder}: all {len(candidates)} checkpoints are damaged; start again with another "
            f"--output, or give --init a saved model folder (several machines need a shared disk, "
            f"or train.save_on_each_node from the start)"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint in a few words, None if it is intact."""
    try:
        content = read_marker(checkpoint)
        _position(content)
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
        return f"{MARKER} is not what was written"
    return None


def save_model(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    record: Mapping[str, Any],
    target: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a folder that `from_pretrained` loads, under its name only once it is complete.

    Args:
        model: the bare model, without wrappers.
        processor: its image processor.
        record: facts of the training or the conversion, stored next to it as `training.json`.
        target: the folder; one of that name is replaced.
        weights: gathered ones, if the model itself holds only a shard.
    """
    with written_aside(target) as aside:
        model.save_pretrained(aside, state_dict=weights)
        processor.save_pretrained(aside)
        write_record(aside, record)


def sha256_of(path: Path) -> str:
    """The hash of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_bare_weights(
    models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str
) -> None:
    """Name the weights as if unwrapped, so that any number of processes can resume."""
    for model, state in zip(models, weights, strict=False):  # sharded models have none
        if isinstance(model, DistributedDataParallel):
            for key in list(state):
                state[key.removeprefix("module.")] = state.pop(key)


def _load_bare_models(models: list[nn.Module], folder: str) -> None:
    for index, model in enumerate(models):
        if isinstance(model, DistributedDataParallel):
            models[index] = model.module


def _load_state(accelerator: Accelerator, checkpoint: Path) -> str | None:
    """Fill model, optimiser and generators; returns what failed in a few words, None if nothing.

    Only tensors and plain values are unpickled, whoever wrote the files.
    """
    hook = accelerator.register_load_state_pre_hook(_load_bare_models)
    try:
        accelerator.load_state(str(checkpoint))
        # Accelerate skips random states that it cannot read, which would change the run
        states = checkpoint / f"random_states_{accelerator.process_index}.pkl"
        if states.exists():
            load(states)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the errors of malformed files have no common base
        return one_line(error)[:_MAX_REASON]
    finally:
        hook.remove()
    return None


def _position(content: Mapping[str, Any]) -> RunPosition:
    position = RunPosition(**content["position"])
    if not all(isinstance(value, int | float) for value in asdict(position).values()):
        raise TypeError("a position holds numbers")
    return position


def _seal(folder: Path, position: RunPosition, record: Mapping[str, Any] | None) -> None:
    """List the files with size and hash, and sync everything to disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    sync(folder)
    content = {"position": asdict(position), "files": files, "record": record}
    write_text(folder / MARKER, json.dumps(content, indent=1))


def _prune(folder: Path, saved: Path, keep: int, report: Callable[[str], None]) -> None:
    """Remove complete checkpoints beyond the newest, never the one just saved."""
    whole = []
    for path in checkpoints(folder):
        problem = None if path == saved else find_damage(path)
        if problem is None:
            whole.append(path)
            continue
        aside = folder / f"damaged_{path.name}"
        replace(path, aside)
        report(f"checkpoint {path} is damaged ({problem}); moved aside as {aside.name}")
    for path in whole[:-keep]:
        if path != saved:
            remove(path)
