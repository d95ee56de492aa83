"""Loaders whose order and augmentation depend on the recipe's seed alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.synchronize import Event
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from detrelay.core.data.collate import DIVISOR, collate, padded_size
from detrelay.core.data.transforms import (
    DetectionDataset,
    ShapeBatches,
    UnnormalizedVisits,
    VisitSampler,
)
from detrelay.core.engine.feature_cache import CachedFeatures


def make_loader(
    data: DetectionDataset | CachedFeatures,
    sampler: VisitSampler,
    batch_size: int,
    *,
    num_workers: int = 0,
    drop_last: bool = False,
    divisor: int = DIVISOR,
) -> DataLoader[Any]:
    """A loader that leaves the global random state alone.

    Its batches hold bytes; `DetrelayImageProcessor.normalize_batch` turns one into the model's
    input once it is on its device.

    Args:
        data: indexed by visit, see `VisitSampler`.
        sampler: gives the visits of an epoch.
        batch_size: images per process.
        num_workers: loader processes; 0 loads in the calling process.
        drop_last: drop an incomplete last batch.
        divisor: padded sides are multiples of it, pixels: the `pad_size_divisor` of the model's
            processor.
    """
    return _loader(data, BatchSampler(sampler, batch_size, drop_last), divisor, num_workers)


def make_eval_loader(
    data: DetectionDataset | CachedFeatures,
    batch_size: int,
    divisor: int,
    *,
    num_workers: int = 0,
    process: int = 0,
    num_processes: int = 1,
    images: int | None = None,
) -> DataLoader[Any]:
    """A loader of every image once, padded no further than alone; see `ShapeBatches`.

    Its batches hold bytes, as those of `make_loader`. It must not be prepared by an accelerator:
    each process already has its share.

    Args:
        data: with the shapes of its samples; without shapes, batches hold one image each.
        batch_size: maximum images per batch.
        divisor: padded sides are multiples of it, pixels: the `pad_size_divisor` of the model's
            processor.
        num_workers: loader processes; 0 loads in the calling process.
        process: number of this process, from 0.
        num_processes: how many there are.
        images: number of images to use, from the first; all if None.
    """
    shapes = [padded_size([shape], divisor) for shape in data.shapes]
    batches = ShapeBatches(
        (shapes or [(index, 0) for index in range(len(data))])[:images],
        batch_size,
        process=process,
        num_processes=num_processes,
    )
    return _loader(data, batches, divisor, num_workers)


def worker_settings(num_workers: int) -> dict[str, Any]:
    """What all loaders share: how their workers live, and that none touches the global state."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": partial(_outlive_signals, _closing(os.getpid())) if num_workers else None,
        "generator": torch.Generator(),  # the default draws worker seeds from the global state
    }


def _loader(
    data: DetectionDataset | CachedFeatures,
    batches: Sampler[list[int]],
    divisor: int,
    num_workers: int,
) -> DataLoader[Any]:
    join: Callable[..., Any] = collate
    if isinstance(data, CachedFeatures):
        join, num_workers = data.collate, 0  # the maps are kept in this process
    return DataLoader(
        UnnormalizedVisits(data) if isinstance(data, DetectionDataset) else data,
        batch_sampler=batches,
        collate_fn=partial(join, divisor=divisor),
        **worker_settings(num_workers),
    )


@cache
def _closing(process: int) -> Event:
    """Set once this process ends: Python then sends SIGTERM to workers that are still there."""
    closing = multiprocessing.Event()
    # unlike `atexit`, this also runs at the end of a multiprocessing process
    Finalize(None, closing.set, exitpriority=0)
    return closing


def _outlive_signals(closing: Event, worker: int) -> None:
    # A stop signal often reaches the whole process group. The workers must keep running until the
    # training process has finished its step; it then ends them itself, at the latest when it exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
