"""Stop signals: a run finishes its step, saves, and exits with a distinct code."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(Exception):
    """A stop signal arrived; the state is on disk.

    Attributes:
        signal_number: SIGINT or SIGTERM.
        step: step of the checkpoint to resume from.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


class StopSignals:
    """Remembers the first SIGTERM or SIGINT instead of exiting; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])
