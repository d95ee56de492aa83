"""How long the parts of a job take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by part of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part; also of one that ends in an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + passed

    def summary(self, images: int) -> str:
        """Images per second of all parts together, and the seconds of each."""
        total = sum(self.seconds.values())
        rate = images / total if total else 0.0
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())
        return f"{rate:.1f} images/s ({parts})"
