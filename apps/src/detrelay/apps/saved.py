"""Load saved models, to use as they are or to start training from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from detrelay.apps.console import is_first_process
from detrelay.apps.training_targets import head_entry
from detrelay.core.backbones import build_backbone
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.detector.loading import load_model, load_processor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.detector.transfer import Transfer, transfer_weights
from detrelay.core.errors import RecipeError, one_line
from detrelay.core.hub.fetch import model_folder
from detrelay.core.recipes.recipe import DataConfig, Recipe
from detrelay.heads import HEADS, HeadEntry

_OWN_OF_DATA = "category_ids"
_PIXELS = ("image_mean", "image_std", "rescale_factor", "do_rescale", "do_normalize")


def load_saved(
    folder: Path, head: str | None = None
) -> tuple[DetectorForObjectDetection, DetrelayImageProcessor]:
    """A model folder as training writes it.

    Args:
        folder: where the model is.
        head: `module:ConfigClass` of its head, if that is not one of this project.

    Raises:
        ValueError: the folder is missing or has no complete detector.
    """
    if head is not None:
        head_entry(head)
    folder = checked_folder(folder)
    return load_model(folder, str(folder)), load_processor(folder, str(folder))


def checked_folder(source: Path) -> Path:
    """The folder of the model; one named as on the Hub is downloaded."""
    folder = model_folder(source)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: no saved model (it has no config.json); name a folder such as "
            f"runs/stageinteractor-cross_stage/best, or a model on the Hub (USER/MODEL)"
        )
    return folder


def saved_head(init: Path, head: str | None = None) -> str:
    """Name of the head of a saved model.

    Args:
        init: folder or name on the Hub.
        head: as given by the user, needed for a head outside this project.

    Raises:
        RecipeError: its head is none of these, or another one.
    """
    file = checked_folder(init) / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(f"--init: {file} is not the config of a model") from error
    if head is not None and head_entry(head).config.model_type == kind:
        return head
    found = [name for name, entry in HEADS.items() if entry.config.model_type == kind]
    if found and head is None:
        return found[0]
    if found:
        raise RecipeError(f"--init {init}: its head is {found[0]}; omit --head {head}")
    raise RecipeError(
        f"--init {init}: holds a {kind!r}; expected one of the heads {', '.join(sorted(HEADS))}, "
        f"or name yours with --head; `detrelay convert` converts models of other programs"
    )


def with_saved_settings(recipe: Recipe, init: Path, *, with_sizes: bool) -> Recipe:
    """A recipe with what a saved model determines: settings of the head, and its preprocessing.

    Of the recipe's own settings of the head those stay that matter in training only.

    Args:
        recipe: for the head of the model.
        init: folder or name on the Hub.
        with_sizes: also take the image sizes, for training and evaluation alike.

    Raises:
        RecipeError: the model's settings or its preprocessing cannot be used.
    """
    folder = checked_folder(init)
    kind = head_entry(recipe.head).config
    try:
        config = kind.from_pretrained(folder)
        default = kind()
        processor = load_processor(folder, str(folder))
    except Exception as error:
        raise RecipeError(f"--init {init}: {one_line(error)}") from error
    trained = _processor_of_training(config)
    for name in _PIXELS:
        if getattr(processor, name) != getattr(trained, name):
            raise RecipeError(
                f"--init {init}: its image processor has {name} {getattr(processor, name)}; "
                f"training a {config.backbone_name} supports only {getattr(trained, name)}"
            )
    before = _settings(default)
    model = {name: value for name, value in _settings(config).items() if value != before[name]}
    model |= {name: recipe.model[name] for name in kind.only_in_training & recipe.model.keys()}
    _say_what_is_not_used(init, recipe.model, {**before, **model})
    data = replace(recipe.data, pad_size_divisor=processor.pad_size_divisor)
    if with_sizes:
        data = _with_sizes(data, processor)
    return replace(recipe, model=model, data=data)


def _say_what_is_not_used(init: Path, asked: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    differing = [
        f"{name} = {used[name]} (recipe: {value})"
        for name, value in asked.items()
        if name in used and used[name] != value
    ]
    if differing and is_first_process():
        print(f"--init {init} decides, not the recipe: {', '.join(differing)}")


def _processor_of_training(config: DetectorConfig) -> DetrelayImageProcessor:
    """One that prepares pixels as training does for the backbone of this config."""
    with torch.device("meta"):
        backbone = build_backbone(
            config.backbone_name, config.backbone_norm, 0, options=config.backbone_options
        )
    return DetrelayImageProcessor(image_mean=backbone.image_mean, image_std=backbone.image_std)


def _with_sizes(data: DataConfig, processor: DetrelayImageProcessor) -> DataConfig:
    short, long = processor.size["shortest_edge"], processor.size["longest_edge"]
    if not short or not long:
        return data
    return replace(
        data, short_sides=(short,), max_size=long, eval_short_side=short, eval_max_size=long
    )


def start_from_saved(
    entry: HeadEntry, config: DetectorConfig, init: Path
) -> DetectorForObjectDetection:
    """A model of this config that starts from the weights of a saved one, in float32.

    Prints what was kept, what is new and what does not fit.

    Raises:
        ValueError: the saved model is incomplete.
    """
    folder = checked_folder(init)
    old = load_model(folder, str(folder), entry.model, dtype=torch.float32)
    model = entry.model(config)
    found = transfer_weights(old, model)
    if is_first_process():
        print("\n".join(_summary(init, old.config, config, found)))
    return model


def _settings(config: DetectorConfig) -> dict[str, Any]:
    """The config values of the head alone, without those of transformers and of the data."""
    shared = {field.name for field in fields(PreTrainedConfig)} | {_OWN_OF_DATA}
    names = [field.name for field in fields(config) if field.name not in shared]
    return {name: getattr(config, name) for name in names}


def _summary(init: Path, old: DetectorConfig, config: DetectorConfig, found: Transfer) -> list[str]:
    lines = []
    if old.class_names != config.class_names:
        lines.append(f"  class scores kept: {', '.join(found.kept_classes) or 'none'}")
        lines.append(f"  class scores new:  {', '.join(found.new_classes) or 'none'}")
    if found.old_queries is not None and found.queries is not None:
        more = found.queries - found.old_queries
        if more > 0:
            lines.append(f"  queries: {found.old_queries} kept, {more} new")
        elif more < 0:
            lines.append(f"  queries: the first {found.queries} of {found.old_queries} kept")
    if found.new:
        lines.append(f"  new: {', '.join(found.new)}")
    if found.left_out:
        lines.append(f"  left out: {', '.join(found.left_out)}")
    before = _settings(old)
    changed = [
        f"  model.{name}: {before[name]} -> {now}"
        for name, now in _settings(config).items()
        if before[name] != now
    ]
    others = "all other weights" if lines else "all weights"
    return [f"start from {init}: {others} are kept", *changed, *lines]
