"""What is written about an image, and how what is unfinished is kept apart."""

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
    """What the model knows.

    Attributes:
        names: by class index.
        category_ids: of the data set it has learned from, by class index.
    """

    names: list[str]
    category_ids: list[int]


@dataclass(frozen=True)
class Detection:
    """An object that was found.

    Attributes:
        index: its class.
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
    """An image and what was found in it.

    Attributes:
        item: which image.
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
        """What rows say of the image; an id only if an annotation file gives one."""
        item = self.item
        known = {} if item.image_id is None else {"image_id": item.image_id}
        frame = item.frame
        place = {} if frame is None else {"frame": frame.index, "time": round(frame.time, 6)}
        return {**known, "file_name": item.file_name, **place}


class Writer(Protocol):
    """One form of results. Made with the output folder and the model's classes."""

    def __init__(self, output: Path, classes: Classes) -> None: ...

    @staticmethod
    def target(output: Path, item: Input) -> Path | None:
        """The file that only this image gets; None where images share one."""
        ...

    def add(self, seen: Seen) -> None:
        """Write what was found in an image."""
        ...

    def close(self, *, complete: bool) -> None:
        """End; `complete` if all images were gone through."""
        ...


class RowFile:
    """A text file that grows as results come, and gets its name when it is complete.

    Args:
        target: the name of the complete file.
        partial: where it grows; `target` with `.partial` behind if not named.
    """

    def __init__(self, target: Path, partial: Path | None = None) -> None:
        self.target = target
        self.partial = partial or target.with_name(f"{target.name}.partial")
        self._file: IO[str] = self.partial.open("w", encoding="utf-8", newline="")

    def write(self, text: str) -> None:
        """Add some text; whoever reads the file sees it at once."""
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
