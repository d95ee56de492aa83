"""Resume a run: read its folder, and check what differs from it.

The newest checkpoint has a copy of the record, which takes precedence over `training.json`: it
replaces a damaged record, and one edited by hand is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrelay.core.engine import run_folder
from detrelay.core.engine.run_folder import RunFolderError
from detrelay.core.errors import DataError, RecipeError
from detrelay.core.recipes.recipe import Recipe, differences

# the trainer checks that their product with the number of processes is unchanged
_SHARE_OUT_A_STEP = ("train.batch_size", "train.accumulation_steps")
_CHANGE_NO_RESULT = (
    "data.num_workers",
    "data.on_bad_image",
    "data.strict",
    "train.activation_checkpointing",
    "train.backbone_weights",  # the checkpoint has all weights
    "train.checkpoint_every",
    "train.compile",
    "train.early_stopping_patience",
    "train.feature_cache_gib",
    "train.keep_checkpoints",
    "train.log_every",
    "train.trackers",
)
# the rows are dealt out to processes and loader workers, whose numbers must stay
_ORDER_OF_A_STREAM = (*_SHARE_OUT_A_STEP, "data.num_workers", "data.train_annotations")
# the data's fingerprint shows whether they are the same
DATA_PATHS = (
    "data.train_annotations",
    "data.train_images",
    "data.val_annotations",
    "data.val_images",
)

Changes = dict[str, tuple[Any, Any]]


def stored_record(output: Path) -> tuple[dict[str, Any], str | None]:
    """The record of the run in a folder, and what to tell the user about it.

    Raises:
        RunFolderError: there is none, neither in `training.json` nor in a checkpoint.
    """
    try:
        return run_folder.read_record(output), None
    except RunFolderError as error:
        record = run_folder.newest_record(output)
        if record is None:
            raise
        return record, f"{error}; taking the copy in the newest checkpoint"


def stored_recipe(output: Path) -> Recipe:
    """The recipe of the run in a folder.

    Raises:
        RunFolderError: the folder holds no record.
        RecipeError: the recipe in it is rejected.
    """
    return _recipe_of(stored_record(output)[0], output)


def _recipe_of(record: dict[str, Any], output: Path) -> Recipe:
    return Recipe.from_mapping(record["recipe"], str(output / run_folder.RECORD))


def refuse_another_run(output: Path) -> None:
    """Refuse to start a run in the folder of another one.

    Raises:
        RunFolderError: the folder has files of a run.
    """
    if found := run_folder.remains_of_a_run(output):
        raise RunFolderError(
            f"{output} holds another run ({', '.join(found)}); continue it with --resume, or name "
            f"another --output"
        )


def check_recipe(output: Path, recipe: Recipe, *, accept_changes: bool) -> Changes:
    """The differences of the recipe from that of the run, if all are allowed.

    Args:
        output: folder of the run.
        recipe: to resume with.
        accept_changes: the user accepts the consequences.

    Raises:
        RunFolderError: the folder contains no run.
        RecipeError: a difference changes the result, or the weights would not fit.
    """
    if not run_folder.remains_of_a_run(output):
        raise RunFolderError(
            f"--resume: {output} holds no run (it has no {run_folder.RECORD}); begin one without "
            f"--resume"
        )
    record = run_folder.newest_record(output) or stored_record(output)[0]
    changes = differences(_recipe_of(record, output), recipe)
    kept = {key: values for key, values in changes.items() if not _may_change(key, values, recipe)}
    if any(key == "head" or key.startswith("model.") for key in kept):
        raise RecipeError(
            f"--resume: the recipe differs from that of the run in {output}: {listed(kept)}; its "
            f"weights would not fit another model: begin another run, which may take them by --init"
        )
    if kept and not accept_changes:
        # a cosine depends on its end: more epochs would have changed all of it
        rule = (
            "only train.epochs may grow"
            if recipe.train.schedule == "multi_step"
            else "under a cosine nothing may change"
        )
        raise RecipeError(
            f"--resume: the recipe differs from that of the run in {output}: {listed(kept)}; "
            f"{rule} of what decides the result; leave it as it was, or accept another result "
            f"with --accept-changes"
        )
    return changes


def check_data(
    output: Path, data: Mapping[str, Any], changes: Changes, *, accept_changes: bool
) -> dict[str, list[str]]:
    """The differences of the data from those of the run, by split, if allowed.

    Args:
        output: folder of the run.
        data: fingerprints by split.
        changes: of the recipe; with other paths, times of files mean nothing.
        accept_changes: the user accepts the consequences.

    Raises:
        DataError: the data differ.
    """
    from detrelay.core.data.fingerprint import all_differences  # brings torch

    record = run_folder.newest_record(output) or stored_record(output)[0]
    before = record.get("data") or {}
    moved = [split for split in data if any(key.startswith(f"data.{split}_") for key in changes)]
    found = all_differences(before, data, moved=moved)
    words = "; ".join(f"{split}: {', '.join(words)}" for split, words in found.items())
    if any(len(before[split]["categories"]) != len(data[split]["categories"]) for split in found):
        raise DataError(
            f"--resume: the data differ from those of the run in {output}: {words}; a model has a "
            f"score for each category: begin another run, which may take the weights by --init"
        )
    if found and not accept_changes:
        raise DataError(
            f"--resume: the data differ from those of the run in {output}: {words}; restore them, "
            f"or accept another result with --accept-changes"
        )
    return found


def _may_change(key: str, values: tuple[Any, Any], recipe: Recipe) -> bool:
    before, after = values
    if recipe.data.stream and key in _ORDER_OF_A_STREAM:
        return False
    if recipe.data.batch_by_shape and key == "train.batch_size":
        return False
    if key == "train.epochs":
        return bool(recipe.train.schedule == "multi_step" and after > before)
    if key in DATA_PATHS:
        # between drawn images and files, or if the images were next to the json, all may differ
        return key.endswith("images") or None not in values
    return key in _SHARE_OUT_A_STEP or key in _CHANGE_NO_RESULT


def listed(changes: Changes) -> str:
    """Changes as part of a sentence."""
    return ", ".join(f"{key} ({old!r} -> {new!r})" for key, (old, new) in changes.items())
