"""One image to go through, wherever it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# file systems allow 255 bytes; suffixes and numbers of frames come behind
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Frame:
    """Where an image stands in a video.

    Attributes:
        index: frames before it.
        time: seconds since the first frame.
    """

    index: int
    time: float


@dataclass(frozen=True)
class Input:
    """An image to go through.

    Attributes:
        file_name: what results call it; the same for all frames of a video.
        read: the pixels, uint8 [3, H, W], of an image with at most so many; raises ImageError.
        image_id: the id in the annotation file that lists the image; None where none does.
        frame: where it stands in its video; None where there is none.
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
    def said(self) -> str:
        """The name in messages."""
        return self.file_name if self.frame is None else f"{self.file_name} {self.frame.index}"


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video to take.

    Attributes:
        step: of so many frames the first.
        limit: at most so many; None for all.
    """

    step: int = 1
    limit: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        place: what stands behind --input.
        output: folder of the results.
        frames: of a video.
    """

    place: str
    output: Path
    frames: FrameChoice


@dataclass(frozen=True)
class Source:
    """Images in their order.

    Attributes:
        inputs: a list where all are known beforehand.
        left_out: what was found beside them, counted.
        is_live: they end only when the user ends them.
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
        source: where it is.
        file_name: what results call it.
        image_id: as in `Input`.
        size: (height, width) that an annotation file claims, pixels.
    """

    def read(max_pixels: int) -> Tensor:
        from detrelay.core.data.decode import read_image

        return read_image(source, size=size, max_pixels=max_pixels, name=file_name)

    return Input(file_name, read, image_id)


def flat_name(name: str) -> str:
    """A path or an address as a name for a file: without folders, colons and the like."""
    parts = name.replace("\\", "/").replace(":", "").split("/")
    flat = "__".join(part for part in parts if part not in ("", ".", ".."))
    return re.sub(r'[?*"<>|\x00-\x1f]', "_", flat)[-_LONGEST_NAME:]
