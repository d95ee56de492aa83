"""Augmentation of image and boxes together, and the visits that training makes.

Everything random comes from torch's default CPU generator, so a transform repeats itself when the
generator's state does. `DetectionDataset` sets that state by visit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.coco import Sample
from detrelay.core.data.collate import EncodedSample
from detrelay.core.errors import DataError
from detrelay.core.recipes.recipe import DataConfig

Transform = Callable[[Sample], Sample]

# What a seed is used for; keeps the random numbers of the order and of the images apart.
_ORDER, _IMAGE = 0, 1
# where no image of a mosaic lies
_GREY = 114
_log = logging.getLogger(__name__)


def resized_shape(
    height: int, width: int, short_side: int, max_size: int | None
) -> tuple[int, int]:
    """The (height, width) that keeps the aspect and makes the short side `short_side`, pixels.

    Where the long side would exceed `max_size`, the short side becomes the nearest whole number
    that keeps it within (DETR's rule; its rounding can leave the long side one or two pixels
    above). The long side is cut to a whole number. A sliver whose short side becomes one pixel is
    no longer than `max_size` either, at the cost of its aspect.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * short_side > max_size:
        # a sliver of an image must not vanish
        short_side = max(1, round(max_size * short / long))
    other = long if short == short_side else int(short_side * long / short)
    if short_side == 1 and max_size is not None:
        other = min(other, max_size)
    return (other, short_side) if height > width else (short_side, other)


# Transforms are partial functions and not closures: loaders that start their workers afresh, as on
# macOS and Windows, must be able to pickle them.


def build_train_transform(config: DataConfig) -> Transform:
    """Flip, then resize or crop and resize (or jitter the scale), then change colours.

    Raises:
        RecipeError: settings that are out of range or wrong together.
    """
    config.check()
    change = config.color_jitter
    colors = v2.ColorJitter(brightness=change, contrast=change, saturation=change)
    return partial(_augment, config=config, colors=colors)


def build_eval_transform(short_side: int, max_size: int) -> Transform:
    """Resize only: short side to `short_side` unless the long side would exceed `max_size`."""
    return partial(_resize, short_side=short_side, max_size=max_size)


def _augment(sample: Sample, config: DataConfig, colors: v2.ColorJitter) -> Sample:
    if torch.rand(()) < config.flip_probability:
        sample = _on_both(tv_functional.horizontal_flip, sample)
    if config.jitter_size:
        sample = _scale_jitter(sample, config.jitter_size, *config.jitter_range)
    else:
        if config.crop and torch.rand(()) < 0.5:
            sample = _resize(sample, _choose(config.crop_short_sides), None)
            sample = _random_crop(sample, *config.crop_range)
        sample = _resize(sample, _choose(config.short_sides), config.max_size)
    if config.color_jitter > 0:
        sample = replace(sample, image=colors(sample.image))
    return sample


def make_mosaic(samples: Sequence[Sample], tile: int) -> Sample:
    """Four images that meet at a random point of a grey canvas of twice the side of a tile.

    Each is fitted into a tile; what reaches out of the canvas is cut, boxes too. Id and original
    size are those of the first image.

    Args:
        samples: four samples: above left, above right, below left, below right.
        tile: side of a tile, pixels.

    Reference:
        Bochkovskiy et al., YOLOv4 (arXiv 2004.10934), section 3.3.
    """
    row, column = (int(torch.randint(tile // 2, tile + tile // 2 + 1, ())) for _ in range(2))
    canvas = torch.full((3, 2 * tile, 2 * tile), _GREY, dtype=torch.uint8)
    boxes = []
    for place, sample in enumerate(samples):
        placed = _scale(sample, tile / max(sample.image.shape[-2:]))
        height, width = placed.image.shape[-2:]
        top = row if place >= 2 else row - height
        left = column if place % 2 else column - width
        window = canvas[:, max(top, 0) : top + height, max(left, 0) : left + width]
        seen = placed.image[:, max(-top, 0) :, max(-left, 0) :]
        window.copy_(seen[:, : window.shape[1], : window.shape[2]])
        boxes.append(placed.boxes_xyxy + placed.boxes_xyxy.new_tensor([left, top, left, top]))
    whole = replace(
        samples[0],
        image=canvas,
        boxes_xyxy=torch.cat(boxes),
        class_labels=torch.cat([sample.class_labels for sample in samples]),
    )
    return _cut(whole, 0, 0, 2 * tile, 2 * tile)


class SampleEncoder(Protocol):
    """What turns a transformed sample into the model's input: the image processor."""

    def encode(self, sample: Sample) -> EncodedSample:
        """The sample as the model takes it; its size stays."""


class DetectionDataset(Dataset[EncodedSample]):
    """Transformed and encoded samples, by visit.

    A visit v >= 0 says both which image and which time: image v % n in epoch v // n, where n is
    the number of samples. All randomness of a visit follows from (seed, v), so a batch is the
    same whatever the number of workers, the order of loading, and after a resume.

    Args:
        samples: a data set of samples with a length.
        transform: applied to each sample.
        processor: encodes the transformed sample.
        seed: which random numbers.
        mosaic: chance that a sample becomes one of four before the transform.
        mosaic_tile: side of each, pixels; see `make_mosaic`.
        skip_broken: an image that cannot be read is reported once, by the process that first meets
            it, and the next readable one takes its place; otherwise its `DataError` is raised.
        wide: which samples are wider than high; read by `sampler`.
        aspect_group: how many samples in a row share that; 1 for any order.
    """

    def __init__(
        self,
        samples: Dataset[Sample],
        transform: Transform,
        processor: SampleEncoder,
        *,
        seed: int,
        mosaic: float = 0.0,
        mosaic_tile: int = 640,
        skip_broken: bool = False,
        wide: Sequence[bool] = (),
        aspect_group: int = 1,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.processor = processor
        self.seed = seed
        self.mosaic = mosaic
        self.mosaic_tile = mosaic_tile
        self.wide = wide
        self.aspect_group = aspect_group
        # shared with the loader's processes, so that only one of them reports an image
        reported = torch.zeros(len(self), dtype=torch.bool) if skip_broken else None
        self._reported = None if reported is None else reported.share_memory_()

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]  # torch's Dataset declares no length

    def __getitem__(self, visit: int) -> EncodedSample:
        """Encode the sample of a visit (0 or above).

        Raises:
            DataError: the image cannot be read, or, where such images are skipped, none can.
        """
        sample = self._read(visit % len(self))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reset the generators of the accelerators as well
            torch.default_generator.manual_seed(_mix(_IMAGE, self.seed, visit))
            if self.mosaic > 0 and torch.rand(()) < self.mosaic:
                others = [self._read(int(torch.randint(len(self), ()))) for _ in range(3)]
                sample = make_mosaic([sample, *others], self.mosaic_tile)
            sample = self.transform(sample)
        return self.processor.encode(sample)

    @property
    def skips_broken(self) -> bool:
        """Whether images that cannot be read are replaced."""
        return self._reported is not None

    def sampler(self) -> VisitSampler:
        """The visits to train on, in an order that follows from the seed and the epoch."""
        return VisitSampler(
            len(self), seed=self.seed, wide=self.wide, aspect_group=self.aspect_group
        )

    def _read(self, index: int) -> Sample:
        """Sample `index`, or the next one that can be read."""
        if self._reported is None:
            return self.samples[index]
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self.samples[place]
            except DataError as error:
                if not self._reported[place]:
                    self._reported[place] = True
                    _log.warning("skipped, the next image takes its place: %s", error)
                last = error
        raise DataError(f"none of {len(self)} images can be read; the last one: {last}")


class VisitSampler(Sampler[int]):
    """The visits of an epoch, each image once.

    Args:
        num_samples: number of images.
        seed: which orders.
        shuffle: draw a new order each epoch; otherwise images come by index.
        wide: which images are wider than high; read where `aspect_group` is above 1.
        aspect_group: how many images in a row are all wide or all high, so that batches of as many
            need little padding; what is left of either kind comes last.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        shuffle: bool = True,
        wide: Sequence[bool] = (),
        aspect_group: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.wide = wide
        self.aspect_group = aspect_group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose visits come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_samples))
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(_ORDER, self.seed, self.epoch))
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        if self.aspect_group > 1:
            order = _grouped(order, self.wide, self.aspect_group)
        first = self.epoch * self.num_samples
        return iter([first + index for index in order])


def _grouped(order: Sequence[int], wide: Sequence[bool], size: int) -> list[int]:
    """The same indices in groups of one kind; a group comes when its last member is due."""
    waiting: dict[bool, list[int]] = {True: [], False: []}
    result: list[int] = []
    for index in order:
        group = waiting[wide[index]]
        group.append(index)
        if len(group) == size:
            result += group
            group.clear()
    return result + waiting[True] + waiting[False]


def _mix(purpose: int, seed: int, number: int) -> int:
    """A seed for torch in which every bit depends on all three numbers.

    torch's CPU generator reads only the low 32 bits of a seed, so sums or shifts would repeat.
    """
    return int(np.random.SeedSequence([purpose, seed, number]).generate_state(1)[0])


def _choose(sizes: tuple[int, ...]) -> int:
    return sizes[int(torch.randint(len(sizes), ()))]


def _on_both(function: Callable[..., Any], sample: Sample, *arguments: Any) -> Sample:
    """Apply a function of torchvision to the image and to the boxes."""
    size = (sample.image.shape[-2], sample.image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(
        sample.boxes_xyxy, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size
    )
    return replace(
        sample,
        image=function(sample.image, *arguments),
        boxes_xyxy=function(boxes, *arguments).as_subclass(torch.Tensor),
    )


def _resize(sample: Sample, short_side: int, max_size: int | None) -> Sample:
    height, width = sample.image.shape[-2:]
    return _resize_to(sample, resized_shape(height, width, short_side, max_size))


def _resize_to(sample: Sample, shape: tuple[int, int]) -> Sample:
    if shape == tuple(sample.image.shape[-2:]):
        return sample
    return _on_both(tv_functional.resize, sample, list(shape))


def _scale(sample: Sample, factor: float) -> Sample:
    height, width = (max(1, round(side * factor)) for side in sample.image.shape[-2:])
    return _resize_to(sample, (height, width))


def _scale_jitter(sample: Sample, size: int, low: float, high: float) -> Sample:
    scale = low + (high - low) * float(torch.rand(()))
    sample = _scale(sample, scale * size / max(sample.image.shape[-2:]))
    return _random_crop(sample, size, size)


def _random_crop(sample: Sample, smallest: int, largest: int) -> Sample:
    """Cut a window whose sides are uniform in [smallest, largest], bounded by the image."""
    height, width = sample.image.shape[-2:]
    window = [
        int(torch.randint(min(smallest, side), min(largest, side) + 1, ()))
        for side in (height, width)
    ]
    top = int(torch.randint(height - window[0] + 1, ()))
    left = int(torch.randint(width - window[1] + 1, ()))
    return _cut(sample, top, left, window[0], window[1])


def _cut(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """A window of the image, and what its boxes hold of it."""
    image = tv_functional.crop(sample.image, top, left, height, width)
    offset = sample.boxes_xyxy.new_tensor([left, top, left, top])
    limit = sample.boxes_xyxy.new_tensor([width, height]).repeat(2)
    boxes = torch.minimum((sample.boxes_xyxy - offset).clamp(min=0), limit)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(
        sample, image=image, boxes_xyxy=boxes[keep], class_labels=sample.class_labels[keep]
    )
