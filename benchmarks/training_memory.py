"""Which part of a detector keeps memory for its gradients in a training step.

    python benchmarks/training_memory.py [--height 800 --width 1344]

One image of noise with seven objects, float32, on the CPU: what each part keeps between the forward
and the backward pass, in MiB: activations without parameters, storage by storage, each counted
where it was first kept. `detrelay cost` measures the peak of a whole step.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from detrelay.apps.build import build_criterion, build_model, find_recipe
from detrelay.core.data.sample import Category
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.structures import Targets
from detrelay.heads.stageinteractor.mixing import DynamicMixing

_RECIPES = ("stageinteractor_r50_1x", "deformable_detr_r50_50e", "dino_r50_4scale_12e")
_CATEGORIES = [Category(number, f"class {number}") for number in range(1, 81)]
_OBJECTS = 7  # as many as an image of COCO has
_PART = re.compile(r"(backbone|neck|encoder|mixing|attention|points|ffn)")
_MIB = 2**20


@dataclass(frozen=True)
class Arguments:
    """Say what a training step keeps in memory."""

    recipes: tuple[str, ...] = _RECIPES
    """Which detectors."""
    height: int = 800
    """Of the image, pixels."""
    width: int = 1344
    """Of the image, pixels."""


def step(model: DetectorForObjectDetection, recipe: str, size: tuple[int, int]) -> Tensor:
    """The loss of one image."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(_OBJECTS, dtype=torch.int64)
    boxes = 0.2 + 0.3 * torch.rand(_OBJECTS, 4, generator=generator)
    targets = Targets(image, boxes, image, 1)
    pixels = torch.rand(1, 3, *size, generator=generator)
    output = model(pixel_values=pixels, targets=targets)
    assert output.groups is not None  # the model is in training
    return build_criterion(find_recipe(recipe))(output.groups, targets).total


def make(recipe: str) -> DetectorForObjectDetection:
    """The recipe's model with random weights, in training."""
    torch.manual_seed(0)
    found = find_recipe(recipe, "train.backbone_weights=none")
    return build_model(found, _CATEGORIES).train()


def kept_by_part(recipe: str, size: tuple[int, int]) -> dict[str, float]:
    """MiB kept for the backward pass, by part."""
    model = make(recipe)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    inside: list[str] = []

    def leave(*_: object) -> None:  # what a hook returns would replace the output
        inside.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(leave)
    seen: dict[int, Tensor] = {}  # the tensors too: an address is not used anew while they live
    kept: Counter[str] = Counter()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            found = _PART.search(inside[-1]) if inside else None
            part = found[1] if found else "rest of the head" if inside else "losses"
            kept[part] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model, recipe, size)
    generated = sum(
        module.generator.out_features * model.config.num_queries * 4
        for module in model.modules()
        if isinstance(module, DynamicMixing)
    )
    rows = {part: size / _MIB for part, size in kept.most_common()}
    rows["all"] = sum(rows.values())
    if generated:
        rows["of it, generated filters"] = generated / _MIB
    return rows


def main(arguments: Arguments) -> None:
    """Print a table per recipe."""
    torch.set_num_threads(1)
    size = arguments.height, arguments.width
    print(f"one image of {size[0]} x {size[1]}, torch {torch.__version__}")
    for recipe in arguments.recipes:
        print(f"\n{recipe}: MiB kept for the backward pass")
        for part, mib in kept_by_part(recipe, size).items():
            print(f"  {part:28}{mib:8.0f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
