"""Training steps from image files to new weights: speed, memory, and where the time goes."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from detrelay.apps.build import build_datasets, build_parts
from detrelay.apps.train import RECIPES
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.engine.loaders import make_loader
from detrelay.core.engine.memory import peak_memory_mib
from detrelay.core.engine.optimizer import build_optimizer
from detrelay.core.engine.update import Updater
from detrelay.core.recipes.recipe import Recipe, load_recipe

_WARM_UP = 2
_OBJECTS = 7  # the average of a COCO image
_CLASSES = 80
_FILE_SCALE = 0.48  # sides of a file over those trained on: files of 640 x 384 for 1333 x 800
_PARTS = ("data", "backbone", "head", "losses", "backward", "update")

HEADER = f"{'':34}{'s/step':>8}{'images/s':>10}{'peak MiB':>10}  share of the time"


@dataclass(frozen=True)
class TrainingCase:
    """What one row measures.

    Attributes:
        recipe: name of its recipe; all images have the same size, whatever the recipe says.
        precision: autocast type, as in `train.mixed_precision`.
        compiled: whether torch.compile is used.
        batch_size: images per step.
        height, width: pixels of the images after resizing.
        steps: timed steps, after two to warm up.
        threads: CPU threads.
    """

    recipe: str
    precision: str
    compiled: bool
    batch_size: int
    height: int
    width: int
    steps: int
    threads: int

    @property
    def name(self) -> str:
        """The name of the row."""
        precision = {"no": "float32"}.get(self.precision, self.precision)
        compiled = ", compiled" if self.compiled else ""
        return f"{precision}{compiled}, batches of {self.batch_size}"


@dataclass(frozen=True)
class TrainingRow:
    """One measurement.

    Attributes:
        name: what was run.
        seconds: per step, mean, including waiting for data.
        images_per_second: likewise.
        peak_mib: of the accelerator's memory, or of the process on a CPU, 2^20 bytes.
        shares: of the time, by part of the step; the backbone counts as head when compiled.
    """

    name: str
    seconds: float
    images_per_second: float
    peak_mib: float
    shares: dict[str, float]

    def __str__(self) -> str:
        parts = "  ".join(f"{part} {share:.0%}" for part, share in self.shares.items())
        return (
            f"{self.name:34}{self.seconds:8.2f}{self.images_per_second:10.2f}"
            f"{self.peak_mib:10.0f}  {parts}"
        )


class Clock:
    """Adds up the time of each part of a step.

    Args:
        device: synchronised at the end of each part, if `exact`.
        exact: an accelerator then cannot run ahead, which makes steps slower.
    """

    def __init__(self, device: torch.device, exact: bool = False) -> None:
        self.device = device
        self.exact = exact
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = self._now()
        yield
        self.seconds[name] += self._now() - start  # type: ignore[assignment]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def call(*args: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*args, **options)

        return call

    def _now(self) -> float:
        if self.exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure_training(case: TrainingCase) -> TrainingRow:
    """Train a few steps in a separate process, so that memory is counted from zero."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(train_here, case).result()


def train_here(case: TrainingCase) -> TrainingRow:
    """Train a few steps in this process."""
    torch.set_num_threads(case.threads)
    with TemporaryDirectory() as folder:
        accelerator = Accelerator(mixed_precision=case.precision)
        exact = accelerator.device.type == "cuda"  # there the parts are timed in separate steps
        count = case.batch_size * (_WARM_UP + case.steps * (2 if exact else 1))
        annotations = draw_images(Path(folder), count, case.height, case.width)
        updater, processor, loader, clock = _set_up(recipe_of(case, annotations), accelerator)
        batches = iter(loader)

        def run(steps: int) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                with clock.part("data"):
                    batch = next(batches)
                    batch = processor.normalize_batch(batch)
                updater([batch])
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        run(_WARM_UP)
        clock.seconds.clear()
        seconds = run(case.steps)
        total = seconds
        if exact:
            clock.exact = True
            clock.seconds.clear()
            total = run(case.steps)
        accelerator.free_memory()  # releases the loader, which then ends its workers at once
        spent = clock.seconds
        spent["head"] = spent.pop("model") - spent["backbone"]
        return TrainingRow(
            name=case.name,
            seconds=seconds / case.steps,
            images_per_second=case.steps * case.batch_size / seconds,
            peak_mib=peak_memory_mib(accelerator.device),
            shares={part: spent[part] / total for part in _PARTS},
        )


def recipe_of(case: TrainingCase, annotations: Path) -> Recipe:
    """The recipe with images of one size from one file."""
    return load_recipe(
        RECIPES / f"{case.recipe}.toml",
        [
            f"data.train_annotations={json.dumps(str(annotations))}",
            f"data.val_annotations={json.dumps(str(annotations))}",
            f"data.train_images={json.dumps(str(annotations.parent))}",
            f"data.val_images={json.dumps(str(annotations.parent))}",
            f"data.short_sides=[{case.height}]",
            f"data.max_size={case.width}",
            "data.crop=false",
            "train.backbone_weights=none",
            f"train.batch_size={case.batch_size}",
            f"train.mixed_precision={case.precision}",
            f"train.compile={str(case.compiled).lower()}",
        ],
    )


def _set_up(
    recipe: Recipe, accelerator: Accelerator
) -> tuple[Updater, DetrelayImageProcessor, Any, Clock]:
    """What training would use, with a clock on every part."""
    train, val = build_datasets(recipe.data)
    parts = build_parts(recipe, train, val, None, fresh=True)
    loader = make_loader(
        parts.train_data,
        parts.train_data.sampler(),
        recipe.train.batch_size,
        num_workers=recipe.data.num_workers,
    )
    clock = Clock(accelerator.device)
    if recipe.train.compile:
        parts.model.compile(dynamic=True)
    else:
        backbone = parts.model.backbone
        backbone.forward = clock.timed("backbone", backbone.forward)
    optimizer = build_optimizer(parts.model, recipe.train)
    model, optimizer, loader = accelerator.prepare(parts.model.train(), optimizer, loader)
    criterion = parts.criterion
    updater = Updater(accelerator, model, criterion, optimizer, recipe.train.clip_norm)
    for owner, method, part in (
        (updater, "model", "model"),
        (criterion, "plan", "losses"),
        (criterion, "losses", "losses"),
        (accelerator, "backward", "backward"),
        (accelerator, "clip_grad_norm_", "update"),
        (optimizer, "step", "update"),
    ):
        setattr(owner, method, clock.timed(part, getattr(owner, method)))
    return updater, parts.processor, loader, clock


def draw_images(folder: Path, count: int, height: int, width: int) -> Path:
    """Files of smooth noise with random boxes, and the COCO json next to them."""
    generator = np.random.default_rng(0)
    size = (round(width * _FILE_SCALE), round(height * _FILE_SCALE))
    images, annotations = [], []
    for number in range(1, count + 1):
        coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / name)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for _ in range(_OBJECTS):
            x, y = generator.uniform(0, 0.5, 2) * size
            w, h = generator.uniform(0.1, 0.5, 2) * size
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(generator.integers(1, _CLASSES + 1)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index, "name": f"class {index}"} for index in range(1, _CLASSES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = folder / "drawn.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file
