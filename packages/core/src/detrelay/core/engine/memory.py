"""Peak memory, and the largest batch that fits."""

from __future__ import annotations

import math
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size

from detrelay.core.criterion import Criterion
from detrelay.core.detector.checkpointing import checkpoint_activations
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.optimizer import build_optimizer
from detrelay.core.recipes.recipe import TrainConfig
from detrelay.core.structures import Targets

_MEBIBYTE = 2**20
# COCO's images have up to 93
_OBJECTS_PER_IMAGE = 100


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory use of this process: tensors on a GPU, everything on a CPU.

    NaN if the system does not report it (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MEBIBYTE
    if sys.platform == "win32":
        return math.nan
    if sys.platform == "linux":
        # getrusage starts from the peak of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MEBIBYTE


@dataclass(frozen=True)
class Fit:
    """How a process can split its images per step.

    Attributes:
        batch_size: images per pass, the largest number that fits.
        accumulation_steps: passes per step.
    """

    batch_size: int
    accumulation_steps: int


def find_fitting_batch(
    accelerator: Accelerator,
    model: DetectorForObjectDetection,
    criterion: Criterion,
    settings: TrainConfig,
    side: int,
) -> Fit:
    """The largest batch whose worst step fits into memory, with the same images per step.

    Trains a copy of the model on trial: first with all images of a step at once, then with ever
    smaller divisors of their number. Every process gets the same answer.

    Args:
        accelerator: device, precision and processes.
        model: unwrapped and unsharded; left unchanged.
        criterion: the losses.
        settings: batch size and accumulation that define the step.
        side: side in pixels of the largest square that a batch can be padded to.

    Raises:
        ValueError: not even one image fits.
    """
    images = settings.batch_size * settings.accumulation_steps
    sizes = [size for size in range(images, 0, -1) if images % size == 0]
    smaller = iter([*sizes[1:], 0])
    search = find_executable_batch_size(
        partial(_try_step, accelerator, model, criterion, settings, side),
        starting_batch_size=sizes[0],
        reduce_batch_size_fn=lambda: next(smaller),
    )
    try:
        fitting = search()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        fitting = 0
    everywhere = accelerator.gather(torch.tensor([fitting], device=accelerator.device))
    size = int(everywhere.min())
    if size == 0:
        raise ValueError(
            f"--find-batch-size: not even one image of {side} x {side} pixels fits into memory; "
            f"set train.activation_checkpointing=true, train.mixed_precision=bf16 or a smaller "
            f"data.max_size"
        )
    return Fit(size, images // size)


def _try_step(
    accelerator: Accelerator,
    model: DetectorForObjectDetection,
    criterion: Criterion,
    settings: TrainConfig,
    side: int,
    batch_size: int,
) -> int:
    """Train a copy on blank images for two steps; returns the batch size if memory suffices."""
    device = accelerator.device
    trained = deepcopy(model).to(device)
    spares = 1 if settings.ema_decay > 0 else 0
    spares += 1 if accelerator.num_processes > 1 else 0  # DDP's gradient buckets
    spare = [deepcopy(trained) for _ in range(spares)]
    if settings.activation_checkpointing:
        checkpoint_activations(trained)
    trained.train()
    optimizer = build_optimizer(trained, settings)
    pixel_values = torch.zeros(batch_size, 3, side, side, device=device)
    count = batch_size * _OBJECTS_PER_IMAGE
    targets = Targets(
        labels=torch.zeros(count, dtype=torch.int64, device=device),
        boxes=torch.full((count, 4), 0.5, device=device),
        image=torch.arange(batch_size, device=device).repeat_interleave(_OBJECTS_PER_IMAGE),
        batch_size=batch_size,
    )
    for _ in range(2):  # the second one with the optimiser's state
        with accelerator.autocast():
            output = trained(pixel_values=pixel_values, targets=targets)
        plan = criterion.plan(output.groups, targets)
        criterion.losses(plan, plan.counts).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    del spare
    return batch_size
