"""An image to process, from any source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# file systems allow 255 bytes; frame numbers and suffixes are appended
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Frame:
    """Position of an image in a video.

    Attributes:
        index: number of the frame, from 0.
        time: seconds since the first frame.
    """

    index: int
    time: float


@dataclass(frozen=True)
class Input:
    """An image to process.

    Attributes:
        file_name: its name in the results; the same for all frames of a video.
        read: takes the maximum number of pixels, returns uint8 [3, H, W]; raises ImageError.
        image_id: its id in the annotation file; None if no such file lists it.
        frame: its position in a video; None for a still image.
    """

    file_name: str
    read: Callable[[int], Tensor]
    image_id: int | None = None
    frame: Frame | None = None

    @property
    def flat_name(self) -> str:
        """The name for files in one folder; frames are numbered."""
        flat = flat_name(self.file_name)
        return flat if self.frame is None else f"{flat}_{self.frame.index:06d}"

    @property
    def display_name(self) -> str:
        """The name in messages."""
        return self.file_name if self.frame is None else f"{self.file_name} {self.frame.index}"


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video to take.

    Attributes:
        step: take every step-th frame, from the first.
        limit: maximum number of frames taken; None for all.
    """

    step: int = 1
    limit: int | None = None


@dataclass(frozen=True)
class Request:
    """The source that was asked for.

    Attributes:
        place: the value of --input.
        output: folder of the results.
        frames: which frames of a video.
    """

    place: str
    output: Path
    frames: FrameChoice


@dataclass(frozen=True)
class Source:
    """Images in order.

    Attributes:
        inputs: a list if all are known beforehand.
        left_out: counts of files that were ignored.
        is_live: whether they end only when the user interrupts.
    """

    inputs: Iterable[Input]
    left_out: str = ""
    is_live: bool = False


def file_input(
    source: Path | BytesIO,
    file_name: str,
    image_id: int | None = None,
    size: tuple[int, int] | None = None,
) -> Input:
    """An image in a file or in encoded bytes.

    Args:
        source: a path, or the encoded bytes.
        file_name: its name in the results.
        image_id: as in `Input`.
        size: (height, width) according to the annotation file, pixels.
    """

    def read(max_pixels: int) -> Tensor:
        from detrelay.core.data.decode import read_image

        return read_image(source, size=size, max_pixels=max_pixels, name=file_name)

    return Input(file_name, read, image_id)


def flat_name(name: str) -> str:
    """A path or an address as a file name: without folders, colons and the like."""
    parts = name.replace("\\", "/").replace(":", "").split("/")
    flat = "__".join(part for part in parts if part not in ("", ".", ".."))
    return re.sub(r'[?*"<>|\x00-\x1f]', "_", flat)[-_LONGEST_NAME:]
