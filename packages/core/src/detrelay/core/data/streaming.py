"""Training samples from a data set that is read row by row instead of at random access.

A pass takes every row once, in an order that follows from the seed and the epoch: the parts (files)
of the data set come in random order, and rows through a shuffle buffer. Processes and their loader
workers read different parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import IterableDataset, get_worker_info

from detrelay.core.data.augmentation import Augmentation
from detrelay.core.data.coco import AnnotatedImages
from detrelay.core.data.collate import EncodedSample
from detrelay.core.data.decode import MAX_PIXELS
from detrelay.core.data.label_map import chosen_categories
from detrelay.core.data.readers.hub import Stream
from detrelay.core.data.sample import Category, Sample
from detrelay.core.data.transforms import SampleEncoder, mixed_seed
from detrelay.core.errors import DataError

# what a seed is used for; `transforms` has the other numbers
_ROWS, _IMAGE = 10, 11
TAKEN: Literal["taken"] = "taken"
END: Literal["end"] = "end"


class StreamedImages:
    """The training split of a data set that is read as a stream.

    Args:
        stream: the split.
        names: the categories to learn; empty for all.
        rows: number of rows; 0 for the number that the data set states.
        buffer: rows held by each loader worker, of which the next is drawn.
        strict: see `AnnotatedImages`.
        max_pixels: see `AnnotatedImages`.

    Attributes:
        categories: categories by class index.

    Raises:
        DataError: the number of rows is not known, or a name is not a category.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        names: Sequence[str] = (),
        rows: int = 0,
        buffer: int = 1000,
        strict: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        known = [category.name for category in stream.categories]
        if strange := [name for name in names if name not in known]:
            raise DataError(
                f"data.categories: {stream.source} has no category {strange[0]!r}; known are "
                f"{', '.join(known)}"
            )
        if not (rows or stream.rows):
            raise DataError(
                f"{stream.source} does not state its number of rows; set data.stream_rows"
            )
        self.stream = stream
        self.names = names
        self.rows = rows or int(stream.rows or 0)
        self.buffer = buffer
        self.strict = strict
        self.max_pixels = max_pixels
        self.categories: tuple[Category, ...] = tuple(
            category for category in stream.categories if not names or category.name in names
        )

    def __len__(self) -> int:
        return self.rows

    @property
    def report(self) -> StreamedImages:
        """What is known before any row is read: see `summary`."""
        return self

    def summary(self) -> str:
        """What it is, in one line."""
        faults = "refused" if self.strict else "clipped or dropped without being counted"
        return (
            f"{self.rows} images read as a stream from {self.stream.source}, "
            f"{len(self.categories)} categories, shuffle buffer of {self.buffer} rows; boxes that "
            f"leave their image are {faults}"
        )

    def sample(self, row: Any) -> Sample:
        """The sample of a row, as the reader at random access gives it.

        Raises:
            DataError: the row or its image cannot be used.
        """
        part = chosen_categories(self.stream.annotations(row), self.names)
        return AnnotatedImages(part, strict=self.strict, max_pixels=self.max_pixels)[0]


@dataclass(frozen=True)
class Pass:
    """Which pass over the rows comes next, and whose share of it.

    Attributes:
        epoch: number of the epoch, from 0.
        lap: number of the pass in the epoch: above 0 only if the rows do not fill the epoch.
        skip: samples of this process that were taken before.
        process: number of this process, from 0.
        num_processes: how many share the rows.
    """

    epoch: int = 0
    lap: int = 0
    skip: int = 0
    process: int = 0
    num_processes: int = 1


class StreamedSamples(IterableDataset[Any]):
    """The transformed and encoded samples of a pass, with pixels as bytes.

    Each loader worker gives the samples of its own rows: `TAKEN` instead of a sample that was
    certainly taken before, which is not decoded, and `END` without end after the last one. (If a
    worker stopped, the order of the others would depend on the time at which it did.) So samples
    that are taken from the workers in turn come in an order, and with random numbers, that follow
    from seed, pass, and number of processes and workers alone.

    Args:
        images: the stream.
        transform: applied to each sample; neither mosaic nor mixup.
        processor: encodes the transformed sample.
        seed: which random numbers.

    Attributes:
        next_pass: to be set before each iteration.
    """

    def __init__(
        self,
        images: StreamedImages,
        transform: Augmentation,
        processor: SampleEncoder,
        *,
        seed: int,
    ) -> None:
        self.images = images
        self.transform = transform
        self.processor = processor
        self.seed = seed
        self.next_pass = Pass()
        self._rows = images.stream.data

    def share_out(self, num_processes: int, num_workers: int) -> int:
        """Split the files of the data set further if they are too few, where the format can.

        Args:
            num_processes: how many share the rows.
            num_workers: wanted loader workers of each process.

        Returns:
            The number of workers of each process that get a part of their own.
        """
        rows = self.images.stream.data
        self._rows = rows if rows.num_shards >= num_processes * num_workers else rows.reshard()
        parts = int(self._shuffled(Pass(num_processes=num_processes)).num_shards)
        return min(num_workers, parts)

    def _shuffled(self, now: Pass) -> Any:
        """The rows of this process; in a loader worker, only its own."""
        from datasets.distributed import split_dataset_by_node

        seed = mixed_seed(_ROWS, self.seed, now.epoch, now.lap)
        rows = self._rows.shuffle(seed=seed, buffer_size=self.images.buffer)
        return split_dataset_by_node(rows, rank=now.process, world_size=now.num_processes)

    def __iter__(self) -> Iterator[EncodedSample | str]:
        info, now = get_worker_info(), self.next_pass
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        for number, row in enumerate(self._shuffled(now)):
            if number < now.skip // num_workers:
                yield TAKEN
                continue
            sample = self.images.sample(row)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(
                    mixed_seed(_IMAGE, self.seed, now.epoch, now.lap, now.process, worker, number)
                )
                sample = self.transform(sample, now.epoch)
            yield self.processor.encode(sample, normalize=False)
        while True:
            yield END
