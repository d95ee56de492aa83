"""The loss of a detector that is called with labels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.losses import LossConfig
from detrelay.core.structures import StageGroup, Targets

# The one place where core uses the assigners, by name and lazily: the losses of a model need them,
# its predictions do not, and core imports no other root.
_ASSIGNERS = "detrelay.assigners"


class LossFunction(Protocol):
    """What computes the loss of a detector; `Criterion` is one."""

    def __call__(
        self,
        groups: Sequence[StageGroup],
        targets: Targets,
        image_ids: Sequence[int] | None = None,
    ) -> CriterionOutput:
        """Losses of a batch.

        Args:
            groups: what the head returned.
            targets: the objects of the batch.
            image_ids: dataset ids of the images, for error messages; None if unknown.
        """


def published_criterion(losses: LossConfig, assigner: str) -> Criterion:
    """The criterion with the loss numbers and the assigner that a head was published with.

    Args:
        losses: the numbers of the loss.
        assigner: a name in `detrelay.assigners.ASSIGNERS`.

    Raises:
        ValueError: there is no such assigner.
    """
    build_assigners = import_module(_ASSIGNERS).build_assigners
    return Criterion(losses.terms(), build_assigners(assigner, losses))
