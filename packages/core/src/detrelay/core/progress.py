"""Training progress, for parts that change during training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TrainingProgress:
    """Shared by the trainer, which updates it, and by parts whose constructor asks for `progress`.

    Attributes:
        share: steps done over all steps, in [0, 1].
    """

    share: float = 0.0
