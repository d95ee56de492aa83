"""Sizes of resized and of padded images. Imports nothing, so that exported detectors share it."""

from __future__ import annotations

from collections.abc import Iterable

# of most released models; a model's own is in its image processor
DIVISOR = 32


def padded_size(sizes: Iterable[tuple[int, int]], divisor: int) -> tuple[int, int]:
    """The (height, width) of a batch: its largest sides, rounded up to multiples of `divisor`.

    Args:
        sizes: (height, width) of each image, pixels.
        divisor: both sides are multiples of it, pixels; 1 pads only to the largest image.

    Raises:
        ValueError: `divisor` is below 1.
    """
    if divisor < 1:
        raise ValueError(f"the size divisor must be at least 1 pixel, found {divisor}")
    heights, widths = zip(*sizes, strict=True)
    return (
        -(-max(heights) // divisor) * divisor,
        -(-max(widths) // divisor) * divisor,
    )


def resized_shape(
    height: int, width: int, short_side: int, max_size: int | None
) -> tuple[int, int]:
    """The (height, width) that keeps the aspect and makes the short side `short_side`, pixels.

    If the long side would exceed `max_size`, the short side becomes the nearest integer that keeps
    it within (DETR's rule; its rounding can leave the long side one or two pixels above). The long
    side is truncated to an integer. A sliver whose short side becomes one pixel does not exceed
    `max_size` either, at the cost of its aspect ratio.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * short_side > max_size:
        # a sliver of an image must not vanish
        short_side = max(1, round(max_size * short / long))
    other = long if short == short_side else int(short_side * long / short)
    if short_side == 1 and max_size is not None:
        other = min(other, max_size)
    return (other, short_side) if height > width else (short_side, other)
