"""The results of an image, and files that get their name only once they are complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from detrelay.apps.sources.item import Input

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        names: by class index.
        category_ids: those of its training data, by class index.
    """

    names: list[str]
    category_ids: list[int]


@dataclass(frozen=True)
class Detection:
    """A detected object.

    Attributes:
        index: its class index.
        score: 0 to 1.
        box_xyxy: in pixels of the image.
    """

    index: int
    score: float
    box_xyxy: tuple[float, float, float, float]

    @property
    def box_xywh(self) -> tuple[float, float, float, float]:
        """Left, top, width and height."""
        left, top, right, bottom = self.box_xyxy
        return left, top, right - left, bottom - top


@dataclass(frozen=True)
class Seen:
    """An image and its detections.

    Attributes:
        item: the image.
        pixels: uint8 [3, H, W].
        found: best first.
    """

    item: Input
    pixels: Tensor
    found: list[Detection]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def facts(self) -> dict[str, Any]:
        """The columns about the image; an id only if an annotation file gives one."""
        item = self.item
        known = {} if item.image_id is None else {"image_id": item.image_id}
        frame = item.frame
        place = {} if frame is None else {"frame": frame.index, "time": round(frame.time, 6)}
        return {**known, "file_name": item.file_name, **place}


class Writer(Protocol):
    """A format of results. Constructed with the output folder and the model's classes."""

    def __init__(self, output: Path, classes: Classes) -> None: ...

    @staticmethod
    def target(output: Path, item: Input) -> Path | None:
        """The file of this image alone; None if images share a file."""
        ...

    def add(self, seen: Seen) -> None:
        """Write the detections in an image."""
        ...

    def close(self, *, complete: bool) -> None:
        """Finish; `complete` if all images were processed."""
        ...


class RowFile:
    """A text file that grows with the results, and gets its name when it is complete.

    Args:
        target: the name of the complete file.
        partial: its name until then; None for `target` with the suffix `.partial`.
    """

    def __init__(self, target: Path, partial: Path | None = None) -> None:
        self.target = target
        self.partial = partial or target.with_name(f"{target.name}.partial")
        self._file: IO[str] = self.partial.open("w", encoding="utf-8", newline="")

    def write(self, text: str) -> None:
        """Append text, visible to readers of the file at once."""
        self._file.write(text)
        self._file.flush()

    def close(self, *, complete: bool) -> None:
        """Give the file its name if it is complete."""
        from detrelay.core.engine.atomic_folder import replace, sync

        self._file.close()
        if complete:
            sync(self.partial)
            replace(self.partial, self.target)


def coco_rows(seen: Seen, classes: Classes) -> list[Mapping[str, Any]]:
    """COCO results of one image, with its file name and each category's name."""
    return [
        {
            **seen.facts,
            "category_id": classes.category_ids[one.index],
            "bbox": list(one.box_xywh),
            "score": one.score,
            "category": classes.names[one.index],
        }
        for one in seen.found
    ]
