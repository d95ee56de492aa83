"""The batches of training, epoch after epoch: from data at random access, or from a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from detrelay.core.data.collate import EncodedSample, collate
from detrelay.core.data.streaming import END, Pass, StreamedSamples
from detrelay.core.data.transforms import DetectionDataset
from detrelay.core.engine.feature_cache import CachedFeatures
from detrelay.core.engine.loaders import make_loader, worker_settings
from detrelay.core.errors import DataError

_log = logging.getLogger(__name__)


class TrainBatches(Protocol):
    """What the training loop takes its batches from.

    Attributes:
        unprepared: loaders that the accelerator has to prepare, with the model and the optimiser.
        num_images: images of an epoch, over all processes.
    """

    unprepared: Sequence[DataLoader[Any]]
    num_images: int

    def __len__(self) -> int:
        """Batches of this process in an epoch."""

    def take(self, prepared: Sequence[Any]) -> None:
        """Take over the prepared loaders."""

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` (from 0) after the first `skip`, on the device."""


class VisitBatches:
    """The batches of data at random access, in an order that follows from seed and epoch.

    Args:
        accelerator: distributes the batches over the processes.
        data: indexed by visit.
        batch_size: images of a batch.
        images_per_step: images of a step over all processes.
        num_workers: loader workers; 0 loads in the calling process.
        divisor: of the padded sides, pixels: the `pad_size_divisor` of the model's processor.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        data: DetectionDataset | CachedFeatures,
        batch_size: int,
        images_per_step: int,
        *,
        num_workers: int,
        divisor: int,
    ) -> None:
        self.accelerator = accelerator
        self.num_images = len(data)
        if isinstance(data, DetectionDataset):
            data.images_per_step = images_per_step
        self.sampler = data.sampler()
        loader = make_loader(
            data,
            self.sampler,
            batch_size,
            num_workers=num_workers,
            drop_last=True,
            divisor=divisor,
        )
        self.unprepared: Sequence[DataLoader[Any]] = (loader,)
        self._loader: Any = None

    def __len__(self) -> int:
        return len(self._loader)

    def take(self, prepared: Sequence[Any]) -> None:
        """Take over the loader as the accelerator has prepared it."""
        (self._loader,) = prepared

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` (from 0) after the first `skip`, on the device."""
        # accelerate renumbers the epoch from its own counter at each pass: set both
        self._loader.set_epoch(number)
        self.sampler.set_epoch(number)
        loader = self._loader
        return iter(self.accelerator.skip_first_batches(loader, skip) if skip else loader)


class StreamBatches:
    """The batches that a process takes from a stream.

    An epoch is a pass over the rows, without the few that fill no step. If the rows of a process
    do not fill the epoch, since processes read files of unequal length or the stated number of
    rows is too high, it starts another pass, and says so.

    Args:
        data: the stream.
        batch_size: images of a batch.
        num_batches: batches of this process in an epoch.
        num_workers: wanted loader workers; 0 loads in the calling process.
        divisor: of the padded sides, pixels: the `pad_size_divisor` of the model's processor.
        device: where the batches go.
        process: number of this process, from 0.
        num_processes: how many share the rows.

    Attributes:
        num_workers: loader workers: one for each part of the data set at most.
    """

    unprepared: Sequence[DataLoader[Any]] = ()

    def __init__(
        self,
        data: StreamedSamples,
        batch_size: int,
        num_batches: int,
        *,
        num_workers: int,
        divisor: int,
        device: torch.device,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.data = data
        self.num_images = len(data.images)
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.num_workers = data.share_out(num_processes, num_workers)
        self.divisor = divisor
        self.device = device
        self.process = process
        self.num_processes = num_processes
        self._told = False

    def __len__(self) -> int:
        return self.num_batches

    def take(self, prepared: Sequence[Any]) -> None:
        """Nothing to take over."""

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        """The batches of epoch `number` (from 0) after the first `skip`, on the device.

        The rows of skipped batches are read again, without decoding their images.

        Raises:
            DataError: a row cannot be used, or there are none for this process.
        """
        samples = self._samples(number, skip * self.batch_size)
        for _ in range(self.num_batches - skip):
            batch = collate(list(islice(samples, self.batch_size)), divisor=self.divisor)
            yield send_to_device(batch, self.device, non_blocking=True)

    def _samples(self, epoch: int, skip: int) -> Iterator[EncodedSample]:
        """The samples of an epoch after the first `skip`, without end."""
        found = 0
        for lap in count():
            before, ended = found, 0
            for sample in self._loader(epoch, lap, max(0, skip - found)):
                ended = ended + 1 if sample == END else 0
                if ended >= max(1, self.num_workers):  # every worker has said it
                    break
                if sample != END:
                    found += 1
                    if found > skip:
                        yield sample
            self._check_pass(found - before)

    def _loader(self, epoch: int, lap: int, skip: int) -> DataLoader[Any]:
        self.data.next_pass = Pass(epoch, lap, skip, self.process, self.num_processes)
        ahead = 2 * self.batch_size if self.num_workers else None
        settings = worker_settings(self.num_workers)
        # every pass has workers of its own, and single samples need no pinned memory
        settings |= {"persistent_workers": False, "pin_memory": False}
        return DataLoader(self.data, batch_size=None, prefetch_factor=ahead, **settings)

    def _check_pass(self, rows: int) -> None:
        share = f"process {self.process + 1} of {self.num_processes}"
        source = self.data.images.stream.source
        if rows == 0:
            raise DataError(f"{source}: no row for {share}; use fewer processes")
        if not self._told:
            self._told = True
            wanted = self.num_batches * self.batch_size
            _log.warning(
                "%s: %s found %d rows, but its share of an epoch is %d (data.stream_rows or the "
                "data set states %d rows in all); its rows are read again",
                *(source, share, rows, wanted, self.num_images),
            )


def train_batches(
    accelerator: Accelerator,
    data: DetectionDataset | CachedFeatures | StreamedSamples,
    batch_size: int,
    accumulation_steps: int,
    *,
    num_workers: int,
    divisor: int,
) -> TrainBatches:
    """The batches of a run.

    Args:
        accelerator: device and processes.
        data: images to learn from.
        batch_size: images of a batch of one process.
        accumulation_steps: batches of a process that make a step.
        num_workers: loader workers of each process.
        divisor: see `VisitBatches`.
    """
    images_per_step = batch_size * accumulation_steps * accelerator.num_processes
    if not isinstance(data, StreamedSamples):
        return VisitBatches(
            accelerator, data, batch_size, images_per_step, num_workers=num_workers, divisor=divisor
        )
    batches = StreamBatches(
        data,
        batch_size,
        len(data.images) // images_per_step * accumulation_steps,
        num_workers=num_workers,
        divisor=divisor,
        device=accelerator.device,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    if batches.num_workers < num_workers:
        accelerator.print(
            f"note: {batches.num_workers} loader worker(s) instead of {num_workers}: "
            f"{data.images.stream.source} has no more parts"
        )
    return batches
