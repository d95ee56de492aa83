"""Text files in YOLO's format."""

from __future__ import annotations

from pathlib import Path

from detrelay.apps.sources.item import Input
from detrelay.apps.writers.base import Classes, Seen

_LABELS = "labels"


class YoloWriter:
    """`labels/STEM.txt`: class, centre, width and height in [0, 1], score; and `classes.txt`.

    An image without detections has an empty file.
    """

    def __init__(self, output: Path, classes: Classes) -> None:
        self.output = output
        (output / _LABELS).mkdir(parents=True, exist_ok=True)
        names = [" ".join(name.split()) for name in classes.names]
        (output / "classes.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")

    @staticmethod
    def target(output: Path, item: Input) -> Path:
        """The image's text file."""
        name = item.flat_name
        return output / _LABELS / f"{Path(name).stem if item.frame is None else name}.txt"

    def add(self, seen: Seen) -> None:
        """Write the file of an image."""
        from detrelay.core.engine.atomic_folder import write_text

        height, width = seen.size
        lines = []
        for one in seen.found:
            left, top, right, bottom = one.box_xyxy
            values = (
                (left + right) / 2 / width,
                (top + bottom) / 2 / height,
                (right - left) / width,
                (bottom - top) / height,
                one.score,
            )
            lines.append(f"{one.index} " + " ".join(f"{value:.6f}" for value in values) + "\n")
        write_text(self.target(self.output, seen.item), "".join(lines))

    def close(self, *, complete: bool) -> None:
        """Nothing to finish."""
