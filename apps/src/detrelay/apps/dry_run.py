"""Preview of a training run: its length, optimiser groups and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detrelay.apps.build import TrainDataset, build_criterion, build_datasets, build_model
from detrelay.apps.launch import make_accelerator
from detrelay.core.criterion import Criterion
from detrelay.core.data.coco import Category
from detrelay.core.data.collate import padded_size
from detrelay.core.detector.checkpointing import checkpoint_activations
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.optimizer import parameter_groups, warmup_steps
from detrelay.core.engine.precision import precision_note
from detrelay.core.engine.scaling import describe_step, with_scaled_rate
from detrelay.core.errors import DataError
from detrelay.core.recipes.recipe import DataConfig, Recipe
from detrelay.core.structures import Targets

_GIBIBYTE = 2**30
_DIVISOR_PX = 32  # of padded batches
# Multiples of every stride up to 128, so that no level is rounded
_SMALL, _LARGE = (256, 384), (384, 512)
_OBJECTS = 10
_COCO_CLASSES = 80
_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        model: parameters and buffers.
        gradients: of the trained parameters; with several processes twice, also in communication
            buckets.
        optimizer: two moments of each trained parameter.
        average: running average of parameters and buffers, if there is one.
        activations: tensors that the forward pass keeps for the backward pass, estimated.
    """

    model: int
    gradients: int
    optimizer: int
    average: int
    activations: int


def dry_run(recipe: Recipe, *, needs_data: bool) -> int:
    """Print the plan of a run without training; returns the exit code.

    Args:
        recipe: of the run.
        needs_data: the user has named the data; the data of a published recipe may be missing, and
            the plan is then printed as far as it does not depend on them.

    Raises:
        DataError: the data cannot be used; before that nothing is printed, or, if they are not
            needed, all that does not depend on them.
    """
    accelerator = make_accelerator(recipe)
    say = accelerator.print
    samples: TrainDataset | None = None
    problem: DataError | None = None
    try:
        samples, val = build_datasets(recipe.data)
    except DataError as error:
        if needs_data:
            raise
        problem = error
        say(f"no data: {error}\nThe following does not depend on them.\n")
    say(recipe.to_toml())
    if samples is not None:
        say(f"train: {samples.report.summary()}\nval:   {val.report.summary()}\n")
    categories: Sequence[Category] = (
        [Category(index, f"class {index}") for index in range(_COCO_CLASSES)]
        if samples is None
        else samples.categories
    )
    model = build_model(recipe, categories, None, fresh=False).to(accelerator.device).train()
    images = None if samples is None else len(samples)
    say("\n".join(schedule_lines(recipe, accelerator.num_processes, images)))
    say("\n".join(group_lines(model, recipe, accelerator.num_processes)))
    memory = estimate_memory(model, build_criterion(recipe), recipe, accelerator)
    say("\n".join(memory_lines(memory, recipe, accelerator.device)))
    if note := precision_note(accelerator):
        say(note)
    if problem is not None:
        raise problem
    return 0


def schedule_lines(recipe: Recipe, processes: int, images: int | None) -> list[str]:
    """Batch, steps and images seen; if `images` is None, only what does not depend on it."""
    train, batch = recipe.train, images_per_step(recipe, processes)
    lines = [describe_step(train, processes)]
    if images is None:
        return [*lines, f"steps: {train.epochs} epochs of unknown length"]
    steps = images // batch
    lines.append(
        f"steps: {steps} per epoch x {train.epochs} epochs = {steps * train.epochs}; "
        f"{steps * train.epochs * batch} images seen"
    )
    if train.schedule == "cosine":
        shape = "then half a cosine to 0"
    else:
        drops = ", ".join(str(epoch * steps) for epoch in train.milestones if epoch < train.epochs)
        shape = f"then x {train.gamma:g} at steps {drops or 'none'}"
    warmup = warmup_steps(steps, train)
    lines.append(f"learning rate: warm-up of {warmup} steps, {shape}")
    return lines


def images_per_step(recipe: Recipe, processes: int) -> int:
    """Images of one step, over passes and processes."""
    return recipe.train.batch_size * recipe.train.accumulation_steps * processes


def group_lines(model: nn.Module, recipe: Recipe, processes: int) -> list[str]:
    """The optimiser's groups as a table, and what is frozen."""
    settings = with_scaled_rate(recipe.train, images_per_step(recipe, processes))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    lines = ["", "tensors   parameters   learning rate   decay    such as"]
    for group in parameter_groups(model, settings):
        parameters: Any = group["params"]
        count = sum(parameter.numel() for parameter in parameters)
        rates = f"{group['lr']:13.4g}   {group['weight_decay']:<6g}"
        lines.append(f"{len(parameters):7} {count:12,}   {rates}   {names[id(parameters[0])]}")
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    count = sum(parameter.numel() for parameter in frozen)
    return [*lines, f"{len(frozen):7} {count:12,}   frozen", ""]


def memory_lines(memory: Memory, recipe: Recipe, device: torch.device) -> list[str]:
    """The estimate as a table, with the rule that it follows."""
    height, width = largest_batch(recipe)
    rows = [
        ("model", memory.model),
        ("gradients", memory.gradients),
        ("optimiser", memory.optimizer),
        ("average", memory.average),
        ("activations", memory.activations),
    ]
    lines = [f"{name:<12}{value / _GIBIBYTE:8.2f} GiB" for name, value in rows]
    total = sum(value for _, value in rows) / _GIBIBYTE
    small, large = (f"{size[0]} x {size[1]}" for size in (_SMALL, _LARGE))
    return [
        "memory of each device:",
        *lines,
        f"{'together':<12}{total:8.2f} GiB at least",
        "Activations are an estimate: tensors kept for the backward pass, measured on "
        f"{device} with one image of {small} and of {large} pixels ({_OBJECTS} objects),",
        f"extended in proportion to {recipe.train.batch_size} of {height} x {width}. What single "
        "operations need for a moment comes on top.",
    ]


def estimate_memory(
    model: DetectorForObjectDetection,
    criterion: Criterion,
    recipe: Recipe,
    accelerator: Accelerator,
) -> Memory:
    """Bytes that training needs on each device, see `Memory`; may make the model checkpoint."""
    held = [*model.parameters(), *model.buffers()]
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if recipe.train.activation_checkpointing:
        checkpoint_activations(model)
    dtype = _MIXED.get(recipe.train.mixed_precision)
    few, many = (
        kept_for_backward(model, criterion, size, dtype, accelerator.device)
        for size in (_SMALL, _LARGE)
    )
    area_small, area_large = _SMALL[0] * _SMALL[1], _LARGE[0] * _LARGE[1]
    slope = (many - few) / (area_large - area_small)
    height, width = largest_batch(recipe)
    image = few + slope * (height * width - area_small)
    copies = 2 if accelerator.num_processes > 1 else 1
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return Memory(
        model=weights,
        gradients=copies * trained,
        optimizer=2 * trained,
        average=weights if recipe.train.ema_decay else 0,
        activations=round(image * recipe.train.batch_size),
    )


def largest_batch(recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels of the largest batch that can occur in training.

    Without aspect groups a wide and a tall image can share a batch, which then is square.
    """
    data: DataConfig = recipe.data
    if data.jitter_size:
        short = long = data.jitter_size
    else:
        short, long = max(data.short_sides), data.max_size
    if data.multi_scale_epochs:
        short, long = max(short, data.eval_short_side), max(long, data.eval_max_size)
    grouped = (
        recipe.train.batch_size == 1
        or data.batch_by_shape
        or data.aspect_group % recipe.train.batch_size == 0
    )
    return padded_size([(short if grouped else long, long)], _DIVISOR_PX)


def kept_for_backward(
    model: DetectorForObjectDetection,
    criterion: Criterion,
    size: tuple[int, int],
    dtype: torch.dtype | None,
    device: torch.device,
) -> int:
    """Bytes that one image's forward pass and losses keep, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    centers = torch.linspace(0.2, 0.8, _OBJECTS, device=device)
    targets = Targets(
        labels=torch.zeros(_OBJECTS, dtype=torch.int64, device=device),
        boxes=torch.stack([centers, centers, centers / 2, centers / 2], dim=1),
        image=torch.zeros(_OBJECTS, dtype=torch.int64, device=device),
        batch_size=1,
    )
    pixels = torch.rand(1, 3, *size, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = model(pixel_values=pixels, targets=targets)
        assert output.groups is not None  # the model is in training
        criterion(output.groups, targets)
    return sum(kept.values())
