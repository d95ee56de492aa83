"""How far training is, for parts that change on the way."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TrainingProgress:
    """Shared by the trainer, which moves it, and by parts whose constructor asks for `progress`.

    Attributes:
        share: steps done over all steps, in [0, 1].
    """

    share: float = 0.0
