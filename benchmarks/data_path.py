"""From image files to batches: cost by part, images per second by pipeline, padding by order.

    python benchmarks/data_path.py FOLDER [FOLDER ...]

FOLDER holds a data set as `--data` takes it. All on the CPU, one thread, medians.

parts: one image of the folder decoded, flipped and resized, encoded and collated; "before" is the
    way of releases until 0.1, which normalised in the loader and collated floats.
pipelines: images per second of one loader worker, beside a loader of torchvision's own transforms
    and one of plain OpenCV (where `opencv-python-headless` is installed), all to the same size.
padding: share of real pixels and images per second of training steps of a small detector, images
    of several sizes in any order, in aspect groups, and in batches by shape.
evaluation: the same of inference, images as stored and in batches of equal padded shape.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms import v2

from detrelay.apps.build import build_datasets, build_parts, eval_data, find_recipe
from detrelay.core.data.augmentation import Augmentation, Flip, Resize, Step
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.collate import DIVISOR, collate
from detrelay.core.data.geometry import resized_shape
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.transforms import DetectionDataset, UnnormalizedVisits
from detrelay.core.engine.inference import model_inputs
from detrelay.core.engine.loaders import make_eval_loader, make_loader
from detrelay.core.engine.optimizer import build_optimizer
from detrelay.core.engine.update import Updater

Part = Literal["parts", "pipelines", "padding", "evaluation"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Arguments:
    """Time the way from image files to batches."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Data sets."""
    parts: tuple[Part, ...] = ("parts", "pipelines", "padding", "evaluation")
    """What to time."""
    short_side: int = 800
    """Of the images of parts and pipelines, pixels."""
    max_size: int = 1333
    """Limit of the long side, pixels."""
    sides: tuple[int, ...] = (128, 160, 192, 224, 256)
    """Short sides to choose from when padding is measured, pixels; the long side is at most 1.67
    of the largest."""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 4
    """Images of a batch."""
    images: int = 32
    """How many images of a folder are read."""
    repeats: int = 3
    """How often each pipeline runs."""


def images_of(folder: Path) -> AnnotatedImages:
    """The training images of a folder."""
    found, _ = build_datasets(find_recipe("bccd_small", data=[folder]).data)
    assert isinstance(found, AnnotatedImages)
    return found


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median CPU time of a call, the first not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[1:])


def time_parts(folder: Path, arguments: Arguments) -> None:
    """Milliseconds an image, the median over images."""
    images, processor = images_of(folder), DetrelayImageProcessor()
    resize, flip = Resize((arguments.short_side,), arguments.max_size), Flip(1.0)
    rows = []
    for index in range(0, len(images), max(1, len(images) // 7)):
        sample = images[index]
        ready = resize(flip(sample))
        floats, raw = processor.encode(ready), processor.encode(ready, normalize=False)
        batch = collate([raw])
        parts: dict[str, Callable[[], object]] = {
            "decode": lambda index=index: images[index],
            "flip and resize": lambda sample=sample: resize(flip(sample)),
            "before: encode": lambda ready=ready: processor.encode(ready),
            "before: collate": lambda floats=floats: collate([floats]),
            "encode": lambda ready=ready: processor.encode(ready, normalize=False),
            "collate": lambda raw=raw: collate([raw]),
            "on the device: normalise": lambda batch=batch: processor.normalize_batch(batch),
        }
        rows.append({name: median_ms(run, 5) for name, run in parts.items()})
    cost = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print(f"{folder.name}: ms an image, short side {arguments.short_side}")
    for name, value in cost.items():
        print(f"  {name:28}{value:8.2f}{value / cost['flip and resize']:8.2f} of the resize")
    for name, of in {"before": "before: ", "now": ""}.items():
        share = (cost[f"{of}encode"] + cost[f"{of}collate"]) / cost["flip and resize"]
        print(f"  encode and collate {name}: {share:.2f} of the resize")


class _ByTorchvision(Dataset[Tensor]):
    """Files read and resized by torchvision's transforms."""

    def __init__(self, files: list[str], shapes: list[tuple[int, int]]) -> None:
        self.files, self.shapes = files, shapes
        self.last = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = v2.functional.horizontal_flip(decode_image(self.files[index], mode="RGB"))
        image = v2.functional.resize(image, list(self.shapes[index]), antialias=True)
        values: Tensor = self.last(image)
        return values


class _ByOpenCV(_ByTorchvision):
    """Files read and resized by OpenCV, without antialiasing."""

    def __getitem__(self, index: int) -> Tensor:
        import cv2

        cv2.setNumThreads(1)
        image = cv2.cvtColor(cv2.imread(self.files[index]), cv2.COLOR_BGR2RGB)[:, ::-1]
        height, width = self.shapes[index]
        image = cv2.resize(np.ascontiguousarray(image), (width, height))
        values = (image.astype(np.float32) / 255 - _MEAN) / _STD
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1).contiguous()


def _padded(images: list[Tensor]) -> Tensor:
    """Images in one zeroed canvas, as most programs do it."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    canvas = torch.zeros(len(images), 3, height, width)
    for row, image in enumerate(images):
        canvas[row, :, : image.shape[1], : image.shape[2]] = image
    return canvas


def time_pipelines(folder: Path, arguments: Arguments) -> None:
    """Images per second of one worker process, which starts anew for each run."""
    images = images_of(folder)
    count = min(arguments.images, len(images))
    sides = arguments.short_side, arguments.max_size
    shapes = [resized_shape(*size, *sides) for size in images.sizes[:count].tolist()]
    files = [str(images.annotations.images.open(index)) for index in range(count)]
    data = DetectionDataset(
        torch.utils.data.Subset(images, range(count)),
        Augmentation((Step(Flip(1.0)), Step(Resize((sides[0],), sides[1])))),
        DetrelayImageProcessor(),
        seed=0,
    )
    size = arguments.batch_size
    loaders: dict[str, Callable[[], Any]] = {
        "detrelay, bytes to the device": lambda: make_loader(
            data, data.sampler(), size, num_workers=1
        ),
        "detrelay before, floats": lambda: DataLoader(
            data, size, collate_fn=collate, num_workers=1
        ),
        "torchvision": lambda: DataLoader(
            _ByTorchvision(files, shapes), size, collate_fn=_padded, num_workers=1
        ),
    }
    if importlib.util.find_spec("cv2"):
        loaders["OpenCV, not antialiased"] = lambda: DataLoader(
            _ByOpenCV(files, shapes), size, collate_fn=_padded, num_workers=1
        )
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.repeats):
        for name, make in loaders.items():
            batches = iter(make())
            next(batches)  # the worker has started
            start = time.perf_counter()
            read = sum(1 for _ in batches) * size
            rates[name].append(read / (time.perf_counter() - start))
    print(f"{folder.name}: images/s of one worker, short side {arguments.short_side}")
    for name, found in rates.items():
        print(f"  {name:32}{statistics.median(found):8.1f}")


def time_padding(folder: Path, arguments: Arguments) -> None:
    """Real pixels and speed of whole steps, the orders in turns."""
    sides = list(arguments.sides)
    size = arguments.batch_size
    orders = {
        "any order": "data.aspect_group=1",
        "aspect groups": f"data.aspect_group={size}",
        "by shape": "data.batch_by_shape=true",
    }
    runs = {
        name: _steps(folder, [order, f"data.short_sides={sides}"], max(sides), size)
        for name, order in orders.items()
    }
    shares: dict[str, list[float]] = {name: [] for name in runs}
    seconds = dict.fromkeys(runs, 0.0)
    steps = max(2, arguments.images // size)
    for step in range(steps):
        for name, (batches, learn) in runs.items():
            batch = next(batches)
            start = time.process_time()
            learn(batch)
            if step:  # the first one warms up
                seconds[name] += time.process_time() - start
                shares[name].append(float(batch["pixel_mask"].float().mean()))
    print(f"{folder.name}: {steps - 1} steps of {size} images, short sides {sides}")
    for name in runs:
        rate = size * (steps - 1) / seconds[name]
        print(f"  {name:16} real pixels {statistics.mean(shares[name]):.2f}  {rate:6.1f} images/s")


def time_evaluation(folder: Path, arguments: Arguments) -> None:
    """Real pixels and speed of inference at the largest of the sides, both orders in turns."""
    side, size = max(arguments.sides), arguments.batch_size
    recipe = find_recipe(
        "bccd_small",
        f"data.eval_short_side={side}",
        f"data.eval_max_size={int(1.67 * side)}",
        data=[folder],
    )
    samples, others = build_datasets(recipe.data)
    parts = build_parts(recipe, samples, others, None, fresh=True)
    model, processor = parts.model.eval(), parts.processor
    data = eval_data(samples, processor)
    count = min(arguments.images, len(data))
    raw = torch.utils.data.Subset(UnnormalizedVisits(data), range(count))
    loaders = {
        "as stored": DataLoader(raw, size, collate_fn=collate),
        "equal shape": make_eval_loader(data, size, DIVISOR, images=count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    shares: dict[str, Tensor] = {}
    for _ in range(arguments.repeats + 1):
        for name, loader in loaders.items():
            pixels, spent = torch.zeros(2), 0.0
            for batch in loader:
                start = time.process_time()
                with torch.no_grad():
                    model(**model_inputs(processor.normalize_batch(batch)))
                spent += time.process_time() - start
                mask = batch["pixel_mask"]
                pixels += torch.tensor([mask.sum(), mask.numel()])
            seconds[name].append(spent)
            shares[name] = pixels[0] / pixels[1]
    print(f"{folder.name}: {count} images evaluated by {size}, short side {side}")
    for name, share in shares.items():
        rate = count / statistics.median(seconds[name][1:])  # the first pass warms up
        print(f"  {name:16} real pixels {share:.2f}  {rate:6.1f} images/s")


def _steps(
    folder: Path, settings: list[str], largest: int, batch_size: int
) -> tuple[Any, Callable[[Mapping[str, Any]], object]]:
    torch.manual_seed(0)
    recipe = find_recipe(
        "bccd_small",
        *settings,
        f"data.max_size={int(1.67 * largest)}",
        f"train.batch_size={batch_size}",
        "data.num_workers=0",
        data=[folder],
    )
    parts = build_parts(recipe, *build_datasets(recipe.data), None, fresh=True)
    model = parts.model.train()
    updater = Updater(
        Accelerator(cpu=True), model, parts.criterion, build_optimizer(model, recipe.train), 0.1
    )
    loader = make_loader(parts.train_data, parts.train_data.sampler(), batch_size, drop_last=True)
    return iter(loader), lambda batch: updater([parts.processor.normalize_batch(batch)])


def main(arguments: Arguments) -> None:
    """Time what is asked for."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    timers = {
        "parts": time_parts,
        "pipelines": time_pipelines,
        "padding": time_padding,
        "evaluation": time_evaluation,
    }
    for part in arguments.parts:
        for folder in arguments.folders:
            timers[part](folder, arguments)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
