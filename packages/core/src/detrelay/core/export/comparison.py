"""Compare an exported file with its model: differences and speed."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.export.runtimes import Arrays, Run

BATCHES = (1, 2, 3)
# (height, width) as fractions of a square's side; the last two are multiples of no stride
_SHAPES = ((1.0, 1.0), (0.75, 1.0), (1.0, 0.5), (0.51, 0.83), (0.77, 0.35))
_LARGEST, _SMALLEST = 640, 64
_ROUNDS = 5


@dataclass(frozen=True)
class Difference:
    """The largest differences at one shape and batch size.

    Attributes:
        batch: images.
        height: of the batch, pixels.
        width: of the batch, pixels.
        logits: largest difference of class scores before the sigmoid.
        boxes: largest difference of boxes in units of the image.
    """

    batch: int
    height: int
    width: int
    logits: float
    boxes: float


@dataclass(frozen=True)
class Times:
    """Medians for one image on one thread, alternating in one process.

    Attributes:
        height: pixels.
        width: pixels.
        model_seconds: of the model in PyTorch.
        file_seconds: of the exported file.
        rounds: how often each was timed, after a warm-up round.
        load: load average over the last minute; None if the system does not report it.
    """

    height: int
    width: int
    model_seconds: float
    file_seconds: float
    rounds: int
    load: float | None


@dataclass(frozen=True)
class Rounding:
    """The largest differences of a model in float32 from itself in float64.

    Attributes:
        logits: of class scores before the sigmoid.
        boxes: of boxes in units of the image.
    """

    logits: float
    boxes: float


def shapes_of(shortest_edge: int | None) -> list[tuple[int, int]]:
    """Five (height, width) up to the size at which a model is used, pixels.

    Args:
        shortest_edge: of its image processor; None for a fixed size.
    """
    side = min(_LARGEST, max(_SMALLEST, shortest_edge or _LARGEST))
    return [(round(side * high), round(side * wide)) for high, wide in _SHAPES]


def compare(
    model: DetectorForObjectDetection, run: Run, shapes: Sequence[tuple[int, int]]
) -> list[Difference]:
    """Differences at every shape with every batch size, on noise, the last image padded.

    Args:
        model: the original, on the CPU.
        run: the exported file.
        shapes: (height, width) of batches, pixels.
    """
    generator = np.random.default_rng(0)
    found = []
    for height, width in shapes:
        for batch in BATCHES:
            pixels, mask = _noise(generator, batch, height, width)
            pairs = zip(_original(model, pixels, mask), run(pixels, mask), strict=True)
            logits, boxes = (_largest(ours, theirs) for ours, theirs in pairs)
            found.append(Difference(batch, height, width, logits, boxes))
    return found


def rounding_of(model: DetectorForObjectDetection, shapes: Sequence[tuple[int, int]]) -> Rounding:
    """How far the model in float32 is from itself in float64, on the images of `compare`.

    Args:
        model: on the CPU.
        shapes: (height, width) of batches, pixels.
    """
    exact = copy.deepcopy(model).double()

    def run(pixels: NDArray[np.float32], mask: NDArray[np.int64]) -> Arrays:
        return _original(exact, pixels, mask)

    found = compare(model, run, shapes)
    return Rounding(max(one.logits for one in found), max(one.boxes for one in found))


def measure(
    model: DetectorForObjectDetection, run: Run, shape: tuple[int, int], rounds: int = _ROUNDS
) -> Times:
    """Time both with one image on one thread, alternating.

    Args:
        model: the original, on the CPU.
        run: the exported file, opened with one thread.
        shape: (height, width), pixels.
        rounds: how often to time each.
    """
    pixels, mask = _noise(np.random.default_rng(0), 1, *shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        both: list[Callable[[], Any]] = [
            lambda: _original(model, pixels, mask),
            lambda: run(pixels, mask),
        ]
        ours, theirs = median_seconds(both, rounds)
    finally:
        torch.set_num_threads(threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Times(*shape, ours, theirs, rounds, load)


def median_seconds(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The median time of each call, all in turns, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if number:
                taken.append(time.perf_counter() - start)
    return [median(taken) for taken in seconds]


def _original(
    model: DetectorForObjectDetection, pixels: NDArray[np.float32], mask: NDArray[np.int64]
) -> Arrays:
    with torch.no_grad():
        output = model.eval()(
            pixel_values=torch.from_numpy(pixels), pixel_mask=torch.from_numpy(mask)
        )
    return output.logits.numpy(), output.pred_boxes.numpy()


def _noise(
    generator: np.random.Generator, batch: int, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    pixels = generator.standard_normal((batch, 3, height, width), dtype=np.float32)
    mask = np.ones((batch, height, width), dtype=np.int64)
    mask[-1, height - height // 8 :] = mask[-1, :, width - width // 5 :] = 0
    return pixels * mask[:, None].astype(np.float32), mask


def _largest(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest difference; infinite if the shapes differ or a number is NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    difference = float(np.abs(ours - theirs).max())
    return difference if np.isfinite(difference) else float("inf")
