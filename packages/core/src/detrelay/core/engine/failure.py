"""A step with a non-finite value, saved so that it can be replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from detrelay.core.criterion import Criterion
from detrelay.core.engine.atomic_folder import replace, sync, write_text, written_aside
from detrelay.core.engine.inference import model_inputs
from detrelay.core.engine.update import Updater

_RANDOM_STATE, _DEVICE_RANDOM_STATE = "random_state", "device_random_state"


class NonFiniteStep(FloatingPointError):
    """A loss or a gradient of a step is NaN or infinite.

    Attributes:
        file: the batches of this process, for `replay_failure`; None if they could not be saved.
    """

    def __init__(self, message: str, file: Path | None) -> None:
        super().__init__(message)
        self.file = file


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators, of the CPU and of `device`."""
    states = {_RANDOM_STATE: torch.get_rng_state()}
    if device.type == "cuda":
        states[_DEVICE_RANDOM_STATE] = torch.cuda.get_rng_state(device)
    return states


def save_failure(
    accelerator: Accelerator,
    folder: Path,
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Any]],
    states: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Write the weights and every process's batches; to be called by every process.

    Args:
        accelerator: tells the processes apart.
        folder: of this failure; created if missing.
        model: the bare model, with the weights from before the step.
        batches: of this process.
        states: `random_states` at the beginning of the step.
        facts: stored with the batches as JSON.

    Returns:
        This process's file of batches; its facts are next to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        with TemporaryDirectory(dir=folder) as aside:
            model.save_pretrained(aside)
            for file in Path(aside).iterdir():
                sync(file)
                replace(file, folder / file.name)
    tensors = dict(states)
    for index, batch in enumerate(batches):
        for name, value in model_inputs(batch).items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{name}"] = value
            else:
                tensors |= {f"{index}/{name}/{level}": maps for level, maps in enumerate(value)}
        for image, label in enumerate(batch["labels"]):
            tensors |= {f"{index}/labels/{image}/{key}": value for key, value in label.items()}
    file = folder / f"process_{accelerator.process_index}.safetensors"
    with written_aside(file) as aside:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, aside)
    write_text(file.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return file


def load_failure(file: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The batches of a failed step and the random states before it, on the CPU.

    Raises:
        ValueError: the file was not written by `save_failure`.
    """
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        states = {
            key: tensors.pop(key) for key in (_RANDOM_STATE, _DEVICE_RANDOM_STATE) if key in tensors
        }
        batches: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            index, name, *rest = key.split("/")
            batch = batches.setdefault(int(index), {"labels": {}})
            if name == "labels":
                batch["labels"].setdefault(int(rest[0]), {})[rest[1]] = value
            elif rest:
                batch.setdefault(name, {})[int(rest[0])] = value
            else:
                batch[name] = value
    except Exception as error:
        raise ValueError(f"{file}: not the batches of a failed step ({error})") from error
    for batch in batches.values():
        batch["labels"] = [batch["labels"][image] for image in sorted(batch["labels"])]
        if "feature_maps" in batch:
            levels = batch["feature_maps"]
            batch["feature_maps"] = tuple(levels[level] for level in sorted(levels))
    return [batches[index] for index in sorted(batches)], states


def replay_failure(
    accelerator: Accelerator, file: Path, model: PreTrainedModel, criterion: Criterion
) -> None:
    """Repeat a failed step with this process's batches alone.

    Args:
        accelerator: device and precision, as in the run.
        file: what `save_failure` returned.
        model: loaded from the folder of the file.
        criterion: the losses of the run.

    Raises:
        FloatingPointError: as in the run.
        ValueError: the file was not written by `save_failure`.
    """
    batches, states = load_failure(file)
    device = accelerator.device
    batches = send_to_device(batches, device)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    update = Updater(accelerator, prepared, criterion, prepared_optimizer, clip_norm=0.0)
    torch.set_rng_state(states[_RANDOM_STATE])
    if _DEVICE_RANDOM_STATE in states and device.type == "cuda":
        torch.cuda.set_rng_state(states[_DEVICE_RANDOM_STATE], device)
    update(batches)
