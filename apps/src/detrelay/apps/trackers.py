"""Experiment trackers that receive the figures of the log."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrelay.core.errors import RecipeError, one_line, unknown_name
from detrelay.core.recipes.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

_TRACKERS = ("tensorboard", "trackio", "wandb")


def check_trackers(names: tuple[str, ...]) -> None:
    """Reject a tracker that is unknown or whose package is missing."""
    from accelerate.tracking import get_available_trackers

    for name in names:
        if name not in _TRACKERS:
            raise RecipeError(f"train.trackers: {unknown_name('tracker', name, _TRACKERS)}")
        if name not in map(str, get_available_trackers()):
            raise RecipeError(
                f"train.trackers: {name} is not installed; pip install {name}, or remove it"
            )


def start_trackers(
    accelerator: Accelerator, recipe: Recipe, record: dict[str, Any], output: Path
) -> None:
    """Open the run in every tracker.

    Raises:
        RecipeError: one of them cannot start, for lack of an account or a network.
    """
    names = recipe.train.trackers
    if not names:
        return
    facts = {key: str(value) for key, value in record.items()}
    own_files = {"wandb": {"dir": str(output)}}
    try:
        accelerator.init_trackers("detrelay", facts, init_kwargs=own_files)
    except Exception as error:  # each package has its own errors
        raise RecipeError(
            f"train.trackers={','.join(names)}: cannot start ({one_line(error)}); set the tracker "
            f"up, or remove it"
        ) from error
