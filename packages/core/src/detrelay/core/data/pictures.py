"""Check the images of a dataset: unreadable, dark, blurred, or recurring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.annotations import Annotations
from detrelay.core.data.checking import Defect
from detrelay.core.data.decode import MAX_PIXELS, read_image
from detrelay.core.errors import DataError

# Side of the grey thumbnails to compare; two shots of one scene correlate above this.
_THUMBNAIL = 32
_NEARLY_SAME = 0.9
_BLOCK = 1024
# Mean grey of 255 below which little is visible.
_DARK = 40.0
# Edges are measured with the long side at most this, pixels: noise and compression matter less.
_EDGE_SIDE = 512
# Only the strongest edges count; sharp ones have a large second derivative relative to the first.
_STRONGEST = 0.995
# An image whose edges are softer than the median image's by this factor is blurred.
_SOFT = 0.65
# An image size as frequent as this in training should occur among the evaluated images, unless
# these are so few that its absence is no surprise (chance above the second number).
_FREQUENT, _CHANCE = 0.1, 0.01


@dataclass(slots=True)
class Pixels:
    """Image statistics of a split.

    Attributes:
        thumbnails: [n, 1024], grey, of mean 0 and length 1; rows of zeros where there is none.
        brightness: [n], mean grey value, 0 to 255; NaN where there is none.
        sharpness: [n], second over first derivative at the strongest edges; NaN where there is
            none, as in an image of one colour.
        unreadable: names of the images that cannot be read, with the reason.
    """

    thumbnails: NDArray[np.float32]
    brightness: NDArray[np.float32]
    sharpness: NDArray[np.float32]
    unreadable: list[str]


def look_at_images(part: Annotations, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode every image of a split."""
    thumbnails = np.zeros((len(part), _THUMBNAIL**2), dtype=np.float32)
    brightness = np.full(len(part), np.nan, dtype=np.float32)
    sharpness = brightness.copy()
    unreadable = []
    for row in range(len(part)):
        height, width = part.sizes[row].tolist()
        try:
            image = read_image(
                part.images.open(row),
                size=(height, width),
                max_pixels=max_pixels,
                name=part.images.name(row),
            )
        except DataError as error:
            unreadable.append(str(error))
            continue
        grey = tv_functional.rgb_to_grayscale(image)
        thumbnails[row] = _thumbnail(image)
        brightness[row] = float(grey.float().mean())
        sharpness[row] = _sharpness(grey)
    return Pixels(thumbnails, brightness, sharpness, unreadable)


def _sharpness(grey: torch.Tensor) -> float:
    """Steepness of the strongest edges of an image [1, H, W], independent of contrast."""
    factor = min(1.0, _EDGE_SIDE / max(grey.shape[-2:]))
    shape = [max(1, round(side * factor)) for side in grey.shape[-2:]]
    g = tv_functional.resize(grey, shape, antialias=True)[0].float()
    if min(shape) < 3:
        return float("nan")
    middle = g[1:-1, 1:-1]
    right, left, low, high = g[1:-1, 2:], g[1:-1, :-2], g[2:, 1:-1], g[:-2, 1:-1]
    second = (4 * middle - right - left - low - high).abs().flatten()
    first = torch.hypot((right - left) / 2, (low - high) / 2).flatten()
    rank = max(1, int(_STRONGEST * len(first)))
    slope = float(first.kthvalue(rank).values)
    return float(second.kthvalue(rank).values) / slope if slope > 0 else float("nan")


def check_light(part: Annotations, pixels: Pixels) -> list[Defect]:
    """Images that are dark, or blurred compared with the others of their split."""
    names = [part.images.name(row) for row in range(len(part))]
    known = pixels.sharpness[np.isfinite(pixels.sharpness)]
    limit = _SOFT * float(np.median(known)) if len(known) else 0.0
    found = {
        f"images are dark (mean grey under {_DARK:g} of 255)": pixels.brightness < _DARK,
        "images are blurred beside the others of their split": pixels.sharpness < limit,
    }
    return [
        Defect(what, int(which.sum()), [names[row] for row in np.flatnonzero(which)])
        for what, which in found.items()
        if which.any()
    ]


def _thumbnail(image: torch.Tensor) -> NDArray[np.float32]:
    small = tv_functional.resize(image, [_THUMBNAIL, _THUMBNAIL], antialias=True).float().mean(0)
    values = small.flatten().numpy()
    values = values - values.mean()
    length = float(np.linalg.norm(values))
    return values / length if length > 0 else np.zeros_like(values)


def recurring(first: Pixels, second: Pixels) -> Iterator[tuple[int, int, float]]:
    """Pairs of nearly the same picture in two splits: positions and correlation, closest first."""
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(first.thumbnails), _BLOCK):
        likeness = first.thumbnails[start : start + _BLOCK] @ second.thumbnails.T
        if likeness.size == 0:
            continue
        best = likeness.argmax(1)
        for row in np.flatnonzero(likeness.max(1) > _NEARLY_SAME):
            pairs.append((start + int(row), int(best[row]), float(likeness[row, best[row]])))
    yield from sorted(pairs, key=lambda pair: -pair[2])


def check_recurring(part: Annotations, pixels: Pixels) -> Defect | None:
    """Images that look like an earlier one of their split."""
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(part), _BLOCK):
        block = pixels.thumbnails[start : start + _BLOCK]
        likeness = np.tril(block @ pixels.thumbnails.T, start - 1)
        for row in np.flatnonzero((likeness > _NEARLY_SAME).any(1)):
            best = int(likeness[row].argmax())
            found.append((float(likeness[row, best]), start + int(row), best))
    if not found:
        return None
    examples = [
        f"{part.images.name(row)} is like {part.images.name(best)}: correlation {value:.3f}"
        for value, row, best in sorted(found, reverse=True)
    ]
    return Defect("images look like an earlier one of their split", len(found), examples)


def check_pair(
    train: tuple[str, Annotations, Pixels], other: tuple[str, Annotations, Pixels]
) -> list[Defect]:
    """Defects between two splits: images in both, categories that only one has."""
    defects = []
    pairs = list(recurring(other[2], train[2]))
    if pairs:
        examples = [
            f"{other[1].images.name(a)} ({other[0]}) is like {train[1].images.name(b)} "
            f"({train[0]}): correlation {c:.3f}"
            for a, b, c in pairs
        ]
        what = f"images of {other[0]} look like one of {train[0]}, so figures on them flatter"
        defects.append(Defect(what, len(pairs), examples))
    learned, asked = (
        {part.categories[row].name for row in np.unique(part.box_class)}
        for part in (train[1], other[1])
    )
    if unknown := sorted(asked - learned):
        what = f"categories of {other[0]} have no box in {train[0]}"
        defects.append(Defect(what, len(unknown), unknown))
    sizes, times = np.unique(train[1].sizes, axis=0, return_counts=True)
    present = set(map(tuple, other[1].sizes.tolist()))
    shares = times / len(train[1])
    absent = [
        row
        for row in np.argsort(-times, kind="stable").tolist()
        if shares[row] > _FREQUENT
        and (1 - shares[row]) ** len(other[1]) < _CHANCE
        and tuple(sizes[row].tolist()) not in present
    ]
    if absent:
        examples = [f"{sizes[row][1]}x{sizes[row][0]}" for row in absent]
        what = f"images of {train[0]} have a size that {other[0]} lacks: another camera?"
        defects.append(Defect(what, int(times[absent].sum()), examples))
    return defects
