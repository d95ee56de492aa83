"""The log of a run: JSON lines on disk, progress on the screen."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detrelay.core.engine.atomic_folder import sync, write_text, written_aside


class MetricsLog:
    """A file of JSON lines, one per logged step or evaluation, in the order of the steps.

    Every line has a `kind` ("train" or "evaluation") and a `step`.

    Args:
        path: the file; created with the first line.
        enabled: False on processes that must not write.
        forward: also called with the numbers of each line, as "train/losses/decoder/5/giou", and
            its step, on every process.
    """

    def __init__(
        self,
        path: Path,
        enabled: bool = True,
        forward: Callable[[dict[str, float], int], object] | None = None,
    ) -> None:
        self.path = path
        self.enabled = enabled
        self.forward = forward

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers that JSON cannot hold become null."""
        if self.forward is not None:
            self.forward(_flat_numbers(values, kind), step)
        if not self.enabled:
            return
        line = {"kind": kind, "step": step}
        line |= {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> int:
        """Drop what a run resumed at `step` will write again.

        A checkpoint is taken before the evaluation of its step, so evaluations of that step are
        dropped too, as is a last line truncated by a kill.

        Returns:
            How many other lines were damaged and dropped. If any, the original file is kept next to
            the log with the suffix `.damaged`.
        """
        if not self.enabled or not self.path.exists():
            return 0
        content = self.path.read_bytes()
        texts = content.decode("utf-8", errors="replace").splitlines()
        lines = [_line_of(text) for text in texts]
        damaged = sum(line is None for line in lines[:-1])
        if damaged:
            with written_aside(self.path.with_name(self.path.name + ".damaged")) as aside:
                aside.write_bytes(content)
        kept = [
            json.dumps(line) + "\n"
            for line in lines
            if line is not None
            and (line["step"] < step or (line["step"] == step and line["kind"] == "train"))
        ]
        write_text(self.path, "".join(kept))
        return damaged

    def sync(self) -> None:
        """Sync the lines so far to disk."""
        if self.enabled and self.path.exists():
            sync(self.path)


def _line_of(text: str) -> dict[str, Any] | None:
    """A line of the log; None if it is malformed."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    is_one = isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line
    return line if is_one else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a truncated last line.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return lines


class Progress:
    """Progress with time left: a bar on a terminal, occasional lines elsewhere.

    Args:
        total: steps of the whole run.
        done: steps that a resumed run has already done.
        enabled: False on all but the main process.
    """

    def __init__(self, total: int, done: int, enabled: bool = True) -> None:
        self.total = total
        self.done = self._first = done
        self.enabled = enabled
        self._started = time.perf_counter()
        on_terminal = enabled and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, desc="train", unit="step", dynamic_ncols=True)
            if on_terminal
            else None
        )

    def advance(self) -> None:
        """Count one step."""
        self.done += 1
        if self._bar is not None:
            self._bar.update()

    def report(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show the figures of a step: next to the bar, or as a separate line."""
        shown = {key: f"{value:.3g}" for key, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
        elif self.enabled:
            figures = "  ".join(f"{key} {value}" for key, value in shown.items())
            left = _clock(self.seconds_left())
            line = f"step {self.done}/{self.total}  epoch {epoch}  {figures}  time left {left}"
            print(line, flush=True)

    def message(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self.enabled:
            print(text, flush=True)

    def seconds_left(self) -> float:
        """Time left at the average speed since the start, including evaluations and checkpoints."""
        new = self.done - self._first
        if new == 0:
            return math.inf
        return (time.perf_counter() - self._started) / new * (self.total - self.done)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class SpeedMeter:
    """Images per second and the share of time spent waiting for data, between two readings."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self._start = self._last = time.perf_counter()
        self._steps = 0
        self._waited = 0.0

    def batch_came(self) -> None:
        """End the wait for a batch."""
        self._waited += time.perf_counter() - self._last

    def step_done(self) -> None:
        """Count one step; the time until the next batch arrives counts as waiting."""
        self._steps += 1
        self._last = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """Images per second and share of waiting since the last reading."""
        elapsed = time.perf_counter() - self._start
        speed = self._steps * self.images_per_step / elapsed
        share = self._waited / elapsed
        self._reset()
        return speed, share


def _flat_numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat_numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and math.isfinite(value):
            flat[f"{prefix}/{key}"] = value
    return flat


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
