"""The measurements of an exported file, stored next to it as json and as a page."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detrelay.core.export.comparison import Difference, Rounding, Times
from detrelay.core.export.quantization import Trial

JSON, PAGE = "report.json", "report.md"


@dataclass(frozen=True)
class Bounds:
    """The largest differences up to which a file is written.

    Attributes:
        logits: of class scores before the sigmoid; None for any that is finite.
        boxes: of boxes in units of the image; None for any that is finite.
        ap: of AP as a fraction.
        roundings: scores and boxes may also differ by so many times what the model in float32
            differs from itself in float64. A file as exact as the model needs up to 2.
    """

    logits: float | None
    boxes: float | None
    ap: float
    roundings: float = 0.0


@dataclass(frozen=True)
class Precision:
    """AP of both on one dataset, as fractions.

    Attributes:
        data: the dataset.
        images: number of images.
        model: AP of the model in PyTorch, with its image processor.
        file: AP of the exported file, with the pixels of `ExportedDetector`.
        interval: of the difference file - model: 95 % of the differences when images are resampled
            with replacement, the same for both.
    """

    data: str
    images: int
    model: float
    file: float
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        """File - model."""
        return self.file - self.model


@dataclass(frozen=True)
class ExportReport:
    """Everything that was measured of an exported file.

    Attributes:
        format: a key of `FORMATS`.
        file: its name.
        bytes: its size, including files that belong to it.
        facts: facts specific to the format, such as the opset.
        versions: of the packages that wrote and ran it.
        bounds: the largest differences allowed.
        differences: at each shape and batch size.
        times: of the model and the file.
        precision: of both on a dataset; None if none was given.
        trials: which parts are in 8 bits, and the effect of each; empty if none is.
        rounding: of the model itself; None if nothing depends on it.
    """

    format: str
    file: str
    bytes: int
    facts: dict[str, Any]
    versions: dict[str, str]
    bounds: Bounds
    differences: list[Difference]
    times: Times
    precision: Precision | None
    trials: Sequence[Trial] = ()
    rounding: Rounding | None = None

    @property
    def logits(self) -> float:
        """The largest difference of class scores."""
        return max(difference.logits for difference in self.differences)

    @property
    def boxes(self) -> float:
        """The largest difference of boxes."""
        return max(difference.boxes for difference in self.differences)

    def refusals(self) -> list[str]:
        """What exceeds its bound, in words; empty if nothing does."""
        logits, boxes = self._allowed()
        found = [
            (name, value, bound)
            for name, value, bound in (
                ("logits", self.logits, logits),
                ("boxes", self.boxes, boxes),
                ("AP", self._ap_difference(), self.bounds.ap),
            )
            if not value <= (sys.float_info.max if bound is None else bound)
        ]
        return [f"{name} by {value:.2g} ({_bound(bound)})" for name, value, bound in found]

    def _allowed(self) -> tuple[float | None, float | None]:
        """The bounds of scores and boxes, wider where rounding alone goes that far."""
        logits, boxes, own = self.bounds.logits, self.bounds.boxes, self.rounding
        if own is None:
            return logits, boxes

        def wider(bound: float | None, rounding: float) -> float | None:
            if bound is None or not math.isfinite(rounding):
                return bound
            return max(bound, self.bounds.roundings * rounding)

        return wider(logits, own.logits), wider(boxes, own.boxes)

    def _ap_difference(self) -> float:
        return abs(self.precision.difference) if self.precision else 0.0

    def write(self, folder: Path) -> None:
        """Write both files into a folder."""
        content = {**asdict(self), "beyond_bounds": self.refusals()}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / JSON).write_text(text + "\n", encoding="utf-8")
        (folder / PAGE).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The report in Markdown."""
        times = self.times
        ratio = times.model_seconds / times.file_seconds
        facts = ", ".join(
            f"{name} {value}" for name, value in {**self.facts, **self.versions}.items()
        )
        lines = [
            f"# {self.file}",
            "",
            f"{self.bytes / 1e6:.1f} MB, {facts}.",
            "",
            f"Largest differences from PyTorch: logits {self.logits:.1e} "
            f"({_bound(self.bounds.logits)}), boxes {self.boxes:.1e} "
            f"({_bound(self.bounds.boxes)}).",
            *self._note_on_rounding(),
            "",
            "| batch | height | width | logits | boxes |",
            "|---|---|---|---|---|",
            *(
                f"| {found.batch} | {found.height} | {found.width} | {found.logits:.1e} | "
                f"{found.boxes:.1e} |"
                for found in self.differences
            ),
            "",
            f"One image of {times.height} x {times.width} on one CPU thread: "
            f"{times.model_seconds * 1e3:.0f} ms in PyTorch, {times.file_seconds * 1e3:.0f} ms "
            f"exported, {ratio:.2f} times as fast (medians of {times.rounds}, load of the machine "
            f"{'unknown' if times.load is None else f'{times.load:.1f}'}).",
        ]
        if self.precision is not None:
            found = self.precision
            low, high = found.interval
            lines += [
                "",
                f"AP on {found.data} ({found.images} images): {100 * found.model:.2f} in PyTorch, "
                f"{100 * found.file:.2f} exported, difference "
                f"{100 * found.difference:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] "
                f"(bound {100 * self.bounds.ap:g}).",
            ]
        if self.trials:
            lines += self._table_of_trials()
        if self.refusals():
            lines += ["", f"**Beyond its bounds: {'; '.join(self.refusals())}.**"]
        return "\n".join(lines) + "\n"

    def _note_on_rounding(self) -> list[str]:
        if self.rounding is None:
            return []
        return [
            "",
            f"The model itself in float32 differs from float64 on these images by "
            f"{self.rounding.logits:.1e} and {self.rounding.boxes:.1e}; {self.bounds.roundings:g} "
            f"times as much is allowed.",
        ]

    def _table_of_trials(self) -> list[str]:
        first = self.trials[0]
        return [
            "",
            "Parts in 8 bits, tried on the calibration images, each on top of those kept before:",
            "",
            "| part | layers | AP | difference | ms per image, one thread | kept in |",
            "|---|---|---|---|---|---|",
            *(
                f"| {trial.part} | {trial.layers} | {100 * trial.ap:.2f} | "
                f"{100 * (trial.ap - first.ap):+.2f} | {trial.seconds * 1e3:.0f} | "
                f"{'int8' if trial.kept and trial is not first else 'float32'}"
                f"{' (returned)' if trial.returned else ''} |"
                for trial in self.trials
            ),
            *self._note_on_returned(),
        ]

    def _note_on_returned(self) -> list[str]:
        parts = [trial.part for trial in self.trials if trial.returned]
        if not parts or self.precision is None:
            return []
        return [
            "",
            f"Returned to float32, because the file lost too much on {self.precision.data} with "
            f"it: {', '.join(parts)}. AP there was measured {len(parts) + 1} times.",
        ]


def _bound(bound: float | None) -> str:
    return "no bound" if bound is None else f"bound {bound:g}"
