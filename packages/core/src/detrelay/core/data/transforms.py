"""Augmentation of image and boxes together, and the visits that training makes.

Everything random comes from torch's default CPU generator, so a transform repeats itself when the
generator's state does. `DetectionDataset` sets that state by visit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.coco import Sample
from detrelay.core.data.collate import EncodedSample

Transform = Callable[[Sample], Sample]

# What a seed is used for; keeps the random numbers of the order and of the images apart.
_ORDER, _IMAGE = 0, 1


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """What training does to an image before the model sees it.

    Attributes:
        flip_probability: chance of a mirror image, left to right.
        short_sides: short sides to resize to, pixels; one is drawn for each image.
        max_size: the long side stays within this, pixels.
        crop: with chance 1/2 resize to one of `crop_short_sides` and cut a random window before
            the last resize, as DETR does.
        crop_short_sides: short sides before cutting, pixels.
        crop_range: smallest and largest side of the window, pixels; the image bounds both.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 is none.
    """

    flip_probability: float = 0.5
    short_sides: tuple[int, ...] = (800,)
    max_size: int = 1333
    crop: bool = False
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], found {self.flip_probability}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter must lie in [0, 1], found {self.color_jitter}")
        for name in ("short_sides", "crop_short_sides"):
            sides = getattr(self, name)
            if not sides or min(sides) < 1:
                raise ValueError(f"{name} must hold sizes of at least 1 pixel, found {sides}")
        if self.max_size < max(self.short_sides):
            raise ValueError(
                f"max_size must be at least the largest of short_sides {self.short_sides}, found "
                f"{self.max_size}"
            )
        if not 1 <= self.crop_range[0] <= self.crop_range[1]:
            raise ValueError(
                f"crop_range must be (smallest, largest) of at least 1 pixel, found "
                f"{self.crop_range}"
            )


def resized_shape(
    height: int, width: int, short_side: int, max_size: int | None
) -> tuple[int, int]:
    """The (height, width) that keeps the aspect and makes the short side `short_side`, pixels.

    Where the long side would exceed `max_size`, the short side becomes the nearest whole number
    that keeps it within (DETR's rule; its rounding can leave the long side one or two pixels
    above). The long side is cut to a whole number.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * short_side > max_size:
        # a sliver of an image must not vanish
        short_side = max(1, round(max_size * short / long))
    if short == short_side:
        return height, width
    other = int(short_side * long / short)
    return (other, short_side) if height > width else (short_side, other)


def build_train_transform(config: AugmentationConfig) -> Transform:
    """Flip, then resize or crop and resize, then change colours."""
    jitter = v2.ColorJitter(
        brightness=config.color_jitter,
        contrast=config.color_jitter,
        saturation=config.color_jitter,
    )

    def transform(sample: Sample) -> Sample:
        if torch.rand(()) < config.flip_probability:
            sample = _on_both(tv_functional.horizontal_flip, sample)
        if config.crop and torch.rand(()) < 0.5:
            sample = _resize(sample, _choose(config.crop_short_sides), None)
            sample = _random_crop(sample, *config.crop_range)
        sample = _resize(sample, _choose(config.short_sides), config.max_size)
        if config.color_jitter > 0:
            sample = replace(sample, image=jitter(sample.image))
        return sample

    return transform


def build_eval_transform(short_side: int, max_size: int) -> Transform:
    """Resize only: short side to `short_side` unless the long side would exceed `max_size`."""

    def transform(sample: Sample) -> Sample:
        return _resize(sample, short_side, max_size)

    return transform


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
    """

    def __init__(
        self, samples: Dataset[Sample], transform: Transform, processor: SampleEncoder, *, seed: int
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.processor = processor
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]  # torch's Dataset declares no length

    def __getitem__(self, visit: int) -> EncodedSample:
        """Encode the sample of a visit (0 or above)."""
        sample = self.samples[visit % len(self)]
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reset the generators of the accelerators as well
            torch.default_generator.manual_seed(_mix(_IMAGE, self.seed, visit))
            sample = self.transform(sample)
        return self.processor.encode(sample)


class VisitSampler(Sampler[int]):
    """The visits of an epoch, each image once.

    Args:
        num_samples: number of images.
        seed: which orders.
        shuffle: draw a new order each epoch; otherwise images come by index.
    """

    def __init__(self, num_samples: int, *, seed: int, shuffle: bool = True) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
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
        first = self.epoch * self.num_samples
        return iter([first + index for index in order])


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
    shape = resized_shape(height, width, short_side, max_size)
    if shape == (height, width):
        return sample
    return _on_both(tv_functional.resize, sample, list(shape))


def _random_crop(sample: Sample, smallest: int, largest: int) -> Sample:
    """Cut a window whose sides are uniform in [smallest, largest], bounded by the image."""
    height, width = sample.image.shape[-2:]
    window = [
        int(torch.randint(min(smallest, side), min(largest, side) + 1, ()))
        for side in (height, width)
    ]
    top = int(torch.randint(height - window[0] + 1, ()))
    left = int(torch.randint(width - window[1] + 1, ()))
    image = tv_functional.crop(sample.image, top, left, window[0], window[1])
    offset = sample.boxes_xyxy.new_tensor([left, top, left, top])
    limit = sample.boxes_xyxy.new_tensor([window[1], window[0]]).repeat(2)
    boxes = torch.minimum((sample.boxes_xyxy - offset).clamp(min=0), limit)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return replace(
        sample, image=image, boxes_xyxy=boxes[keep], class_labels=sample.class_labels[keep]
    )
