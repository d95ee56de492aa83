"""The visits that training makes: which image comes when, transformed and encoded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from detrelay.core.data.augmentation import Augmentation
from detrelay.core.data.coco import Sample
from detrelay.core.data.collate import EncodedSample
from detrelay.core.errors import DataError

# What a seed is used for; keeps the random numbers of the order and of the images apart.
_ORDER, _IMAGE, _SIZE = 0, 1, 2
# Groups of similar shape are formed within pools of this many groups or more: few images differ
# much from their group, and the groups still change from epoch to epoch.
_POOL = 32
_log = logging.getLogger(__name__)


class SampleEncoder(Protocol):
    """What turns a transformed sample into the model's input: the image processor."""

    def encode(self, sample: Sample, *, normalize: bool = True) -> EncodedSample:
        """The sample as the model takes it, or with pixels as they are; its size stays."""


@dataclass(frozen=True)
class Order:
    """How the random order of an epoch is grouped; not at all by default.

    Attributes:
        ratios: width over height of each image; needed for groups.
        aspect_group: number of consecutive images that are all wide or all high, so that batches
            of this size need little padding; incomplete groups come last.
        shape_group: number of consecutive images of similar aspect ratio that share their random
            size; replaces `aspect_group`; what fills no group comes last.
    """

    ratios: Sequence[float] = ()
    aspect_group: int = 1
    shape_group: int = 1


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
        order: how consecutive images are grouped; read by `sampler`.
        size_by_step: the images of a step share their random size.
        skip_broken: report an image that cannot be read once and use the next readable one;
            otherwise its `DataError` is raised.
        shapes: (height, width) of each encoded sample, pixels, if known beforehand; `ShapeBatches`
            groups images by them.

    Attributes:
        images_per_step: images of a step over all processes, which the training loop sets; read
            where they share their size.
    """

    def __init__(
        self,
        samples: Dataset[Sample],
        transform: Augmentation,
        processor: SampleEncoder,
        *,
        seed: int,
        order: Order | None = None,
        size_by_step: bool = False,
        skip_broken: bool = False,
        shapes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.processor = processor
        self.seed = seed
        self.order = order or Order()
        self.size_by_step = size_by_step
        self.images_per_step = 1
        self.shapes = shapes
        self._draws: tuple[int, list[float]] = (-1, [])
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
        return self.processor.encode(self.transformed(visit))

    def transformed(self, visit: int) -> Sample:
        """The sample of a visit before it is encoded; see `__getitem__`."""
        epoch, index = divmod(visit, len(self))
        sample = self.read(index)
        if self.size_by_step or self.order.shape_group > 1:
            sample = replace(sample, size_draw=self._size_draw(visit))
        with self.random_numbers(visit):
            return self.transform(sample, epoch, self._any)

    @contextmanager
    def random_numbers(self, visit: int) -> Iterator[None]:
        """Let torch draw the numbers of a visit; the global state is as before afterwards."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would reset the generators of the accelerators as well
            torch.default_generator.manual_seed(mixed_seed(_IMAGE, self.seed, visit))
            yield

    def _size_draw(self, visit: int) -> float:
        """The number that the images of a step, or of a group by shape, share."""
        epoch, index = divmod(visit, len(self))
        size = self.images_per_step if self.size_by_step else self.order.shape_group
        if self._draws[0] != epoch:
            sampler = self.sampler()
            sampler.set_epoch(epoch)
            draws = [0.0] * len(self)
            for place, other in enumerate(sampler):
                group = epoch * len(self) + place // size
                draws[other % len(self)] = mixed_seed(_SIZE, self.seed, group) / 2**32
            self._draws = (epoch, draws)
        return self._draws[1][index]

    def _any(self) -> Sample:
        return self.read(int(torch.randint(len(self), ())))

    @property
    def skips_broken(self) -> bool:
        """Whether images that cannot be read are replaced."""
        return self._reported is not None

    def sampler(self) -> VisitSampler:
        """The visits to train on, in an order that follows from the seed and the epoch."""
        return VisitSampler(len(self), seed=self.seed, order=self.order)

    def read(self, index: int) -> Sample:
        """Sample `index` as it is stored; where broken ones are skipped, the next readable one."""
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


class UnnormalizedVisits(Dataset[EncodedSample]):
    """The visits of a data set with pixels as bytes, for loaders; see `normalize_batch`.

    Args:
        data: whose visits.
    """

    def __init__(self, data: DetectionDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, visit: int) -> EncodedSample:
        """Sample of a visit, its pixels uint8."""
        return self.data.processor.encode(self.data.transformed(visit), normalize=False)


class VisitSampler(Sampler[int]):
    """The visits of an epoch, each image once.

    Args:
        num_samples: number of images.
        seed: which orders.
        shuffle: draw a new order each epoch; otherwise images come by index.
        order: how consecutive images are grouped.
    """

    def __init__(
        self, num_samples: int, *, seed: int, shuffle: bool = True, order: Order | None = None
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.order = order or Order()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose visits come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_samples))
        generator = torch.Generator().manual_seed(mixed_seed(_ORDER, self.seed, self.epoch))
        if self.shuffle:
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        groups = self.order
        if groups.shape_group > 1:
            order = _of_like_shape(order, groups.ratios, groups.shape_group, generator)
        elif groups.aspect_group > 1:
            order = _grouped(order, groups.ratios, groups.aspect_group)
        first = self.epoch * self.num_samples
        return iter([first + index for index in order])


class ShapeBatches(Sampler[list[int]]):
    """Every image once, in batches of one padded shape each: no image is padded to fit another.

    So the detections of an image do not depend on the batch size.

    Args:
        shapes: padded (height, width) of each image, pixels.
        batch_size: maximum images per batch.
        process: number of this process, from 0.
        num_processes: how many share the batches; some are repeated, so that all have equally many.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        batches: list[list[int]] = []
        filling: dict[tuple[int, int], list[int]] = {}
        for index, shape in enumerate(shapes):
            batch = filling.setdefault(shape, [])
            if not batch:
                batches.append(batch)
            batch.append(index)
            if len(batch) == batch_size:
                del filling[shape]
        missing = -len(batches) % num_processes
        batches += [batches[number % len(batches)] for number in range(missing)]
        self.batches = batches[process::num_processes]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _grouped(order: Sequence[int], ratios: Sequence[float], size: int) -> list[int]:
    """The same indices in groups, wide or high; a group comes when it is complete."""
    waiting: dict[bool, list[int]] = {True: [], False: []}
    result: list[int] = []
    for index in order:
        group = waiting[ratios[index] >= 1]
        group.append(index)
        if len(group) == size:
            result += group
            group.clear()
    return result + waiting[True] + waiting[False]


def _of_like_shape(
    order: Sequence[int], ratios: Sequence[float], size: int, generator: torch.Generator
) -> list[int]:
    """The same indices in groups of similar aspect ratio, which come in random order.

    Only what is left at the end may mix wide and high images.
    """
    groups: list[list[int]] = []
    left: list[int] = []
    pools = max(1, len(order) // (size * _POOL))
    bounds = [len(order) * number // pools for number in range(pools + 1)]
    for start, stop in pairwise(bounds):
        pool, left = [*left, *order[start:stop]], []
        for high in (False, True):
            kind = [index for index in pool if (ratios[index] < 1) == high]
            # Random ones are left over: the last by shape would be the same few in every epoch
            whole = len(kind) // size * size
            left += kind[whole:]
            ranked = sorted(kind[:whole], key=ratios.__getitem__)
            groups += [ranked[first : first + size] for first in range(0, whole, size)]
    mixed = torch.randperm(len(groups), generator=generator).tolist()
    return [index for number in mixed for index in groups[number]] + left


def mixed_seed(*numbers: int) -> int:
    """A seed for torch in which every bit depends on all numbers: a purpose, a seed and others.

    torch's CPU generator reads only the low 32 bits of a seed, so sums or shifts would repeat.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
