"""Detection in overlapping tiles of an image, for large pictures with small objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    # from images uint8 [3, H, W] to `scores`, `labels` and `boxes` xyxy of each, on the CPU
    Detect = Callable[[Sequence[Tensor]], list[dict[str, Tensor]]]

# Boxes of one class from two tiles that overlap by more are one object.
_IOU_THRESHOLD = 0.5
_SMALLEST_TILE = 32  # pixels


def in_tiles(detect: Detect, size: int, overlap: float) -> Detect:
    """A detector that looks at the tiles of each image instead of at the whole.

    Args:
        detect: the detector.
        size: side of a tile, pixels; 0 for whole images.
        overlap: least share of a tile that the next one shows again.
    """

    def detect_tiles(images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [_merged(detect, pixels, size, overlap) for pixels in images]

    return detect_tiles if size else detect


def check_tiles(size: int, overlap: float) -> None:
    """Refuse numbers that cannot be meant.

    Raises:
        ValueError: a size or share is out of range.
    """
    if size and size < _SMALLEST_TILE:
        raise ValueError(f"--tiles must be at least {_SMALLEST_TILE} pixels, found {size}")
    if not 0 <= overlap < 1:
        raise ValueError(f"--overlap must be at least 0 and below 1, found {overlap}")


def _merged(detect: Detect, pixels: Tensor, size: int, overlap: float) -> dict[str, Tensor]:
    from detrelay.core.data.tiles import merge, windows

    height, width = pixels.shape[-2:]
    tiles = windows(height, width, size, overlap)
    # one at a time: a large picture has hundreds
    found = [
        detect([pixels[:, t.top : t.top + t.height, t.left : t.left + t.width]])[0] for t in tiles
    ]
    return merge(found, tiles, (height, width), _IOU_THRESHOLD)
