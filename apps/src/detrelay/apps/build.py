"""From a recipe, or a saved folder, to data, model, criterion and trainer.

The building blocks of the commands, also for use in a notebook: `find_recipe`, `build_datasets`,
`build_model`, `build_criterion`, `build_trainer`.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from detrelay.apps.saved import load_saved as load_saved
from detrelay.apps.saved import start_from_saved
from detrelay.apps.training_targets import build_criterion as build_criterion
from detrelay.apps.training_targets import head_entry as head_entry
from detrelay.apps.training_targets import model_config
from detrelay.core.criterion import Criterion
from detrelay.core.data.augmentation import build_eval_transform, build_train_transform
from detrelay.core.data.coco import AnnotatedImages, Category
from detrelay.core.data.fingerprint import fingerprint
from detrelay.core.data.geometry import resized_shape
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.label_map import chosen_categories, with_categories
from detrelay.core.data.places import evaluation_split, open_stream, train_and_val
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.streaming import StreamedImages, StreamedSamples
from detrelay.core.data.tiles import TiledImages
from detrelay.core.data.transforms import DetectionDataset, Order
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine import run_folder
from detrelay.core.engine.trainer import Trainer, TrainingParts
from detrelay.core.errors import RecipeError
from detrelay.core.evaluation.evaluators import Evaluator, build_evaluator
from detrelay.core.recipes.recipe import DataConfig, Recipe

AnyDataset = AnnotatedImages | ShapesDataset
TrainDataset = AnyDataset | StreamedImages

# The drawn images do not depend on the training seed, so runs with different seeds compare.
_DRAWN_TRAIN_SEED, _DRAWN_VAL_SEED = 0, 1


def find_recipe(
    name: str | None = None,
    *settings: str,
    head: str | None = None,
    assigner: str | None = None,
    data: Sequence[str | Path] = (),
) -> Recipe:
    """A recipe as `detrelay train` resolves it.

    Args:
        name: a recipe of the package or a TOML file, as for `--recipe`; None for drawn shapes, or
            for the defaults if `data` is given.
        *settings: "dotted.key=value", as for `--set`.
        head: as for `--head`.
        assigner: as for `--assigner`.
        data: folder, or two COCO files, as for `--data`.

    Raises:
        RecipeError: there is no such recipe, or a setting is rejected.
    """
    from detrelay.apps.train import Arguments, resolve

    paths = tuple(map(Path, data))
    return resolve(Arguments(name, head=head, assigner=assigner, data=paths, set=(settings,)))


def build_datasets(data: DataConfig) -> tuple[TrainDataset, AnyDataset]:
    """Images to train on and to evaluate on, with the same categories.

    Raises:
        DataError: the data cannot be used, or a category to evaluate on is not trained on.
    """
    if data.train_annotations is None:
        return (
            ShapesDataset(data.num_train, image_size=data.image_size, seed=_DRAWN_TRAIN_SEED),
            ShapesDataset(data.num_val, image_size=data.image_size, seed=_DRAWN_VAL_SEED),
        )
    if data.stream:
        return _stream_and_val(data, data.train_annotations)
    folders = [
        None if images is None else Path(images) for images in (data.train_images, data.val_images)
    ]
    train, val = train_and_val(
        (data.train_annotations, folders[0]),
        (data.val_annotations, folders[1]),
        share=data.val_share,
        seed=data.val_seed,
        allow_outside=data.allow_outside,
    )
    train = chosen_categories(train, data.categories, keep_unused=data.keep_unused_categories)
    val = chosen_categories(val, [category.name for category in train.categories])
    return (
        AnnotatedImages(
            train, strict=data.strict, keep_empty=data.keep_empty, max_pixels=data.max_pixels
        ),
        AnnotatedImages(val, strict=data.strict, max_pixels=data.max_pixels),
    )


def _stream_and_val(data: DataConfig, place: str) -> tuple[StreamedImages, AnnotatedImages]:
    """A stream to train on, and images to evaluate on with its categories."""
    stream = open_stream(place, data.categories)
    train = StreamedImages(
        stream,
        names=data.categories,
        rows=data.stream_rows,
        buffer=data.stream_buffer,
        strict=data.strict,
        max_pixels=data.max_pixels,
    )
    folder = None if data.val_images is None else Path(data.val_images)
    val = evaluation_split(data.val_annotations or place, folder, allow_outside=data.allow_outside)
    like = replace(val, source=stream.source, categories=stream.categories, own_ids=stream.own_ids)
    val = chosen_categories(with_categories(val, like), data.categories)
    return train, AnnotatedImages(val, strict=data.strict, max_pixels=data.max_pixels)


def build_parts(
    recipe: Recipe, train: TrainDataset, val: AnyDataset, init: Path | None, *, fresh: bool
) -> TrainingParts:
    """Model, criterion and encoded data of a run.

    Args:
        recipe: what to build.
        train: images to learn from.
        val: images to evaluate on.
        init: folder of a saved model whose weights to start from.
        fresh: False if a checkpoint will fill the model, so that nothing is loaded now.
    """
    model = build_model(recipe, train.categories, init, fresh=fresh)
    return join_parts(recipe, train, val, model, build_criterion(recipe))


def join_parts(
    recipe: Recipe,
    train: TrainDataset,
    val: AnyDataset,
    model: DetectorForObjectDetection,
    criterion: Criterion,
) -> TrainingParts:
    """Model and criterion with the data, augmented and encoded as the recipe says."""
    data = recipe.data
    settings: dict[str, Any] = {
        "size": {"shortest_edge": data.eval_short_side, "longest_edge": data.eval_max_size},
        "pad_size_divisor": data.pad_size_divisor,
        "max_pixels": data.max_pixels,
        "nms_iou_threshold": recipe.train.nms_iou_threshold,
        "image_mean": model.backbone.image_mean,
        "image_std": model.backbone.image_std,
    }
    processor = DetrelayImageProcessor(**settings)
    return TrainingParts(
        model=model,
        processor=processor,
        criterion=criterion,
        train_data=train_data(recipe, train, processor),
        val_data=eval_data(val, processor),
        ground_truth=val.ground_truth,
        category_ids=[category.id for category in train.categories],
        evaluator=_evaluator(recipe),
    )


def train_data(
    recipe: Recipe, train: TrainDataset, processor: DetrelayImageProcessor
) -> DetectionDataset | StreamedSamples:
    """Images to learn from, augmented and encoded as the recipe says."""
    data, seed, transform = recipe.data, recipe.train.seed, build_train_transform(recipe.data)
    if isinstance(train, StreamedImages):
        return StreamedSamples(train, transform, processor, seed=seed)
    images = training_images(data, train)
    order = Order(
        ratios=(images.sizes[:, 1] / images.sizes[:, 0]).tolist(),
        aspect_group=data.aspect_group,
        shape_group=recipe.train.batch_size if data.batch_by_shape else 1,
    )
    return DetectionDataset(
        images,
        transform,
        processor,
        seed=seed,
        order=order,
        size_by_step=data.multi_scale_by_step,
        skip_broken=data.on_bad_image == "skip",
    )


def training_images(data: DataConfig, train: AnyDataset) -> AnyDataset | TiledImages:
    """The images, or their tiles, as the settings say."""
    if not data.tile_size or isinstance(train, ShapesDataset):
        return train
    return TiledImages(
        train,
        size=data.tile_size,
        overlap=data.tile_overlap,
        visible=data.tile_visible,
        keep_empty=data.tile_empty,
    )


def _evaluator(recipe: Recipe) -> Evaluator:
    try:
        return build_evaluator(recipe.train.evaluator, recipe.train.evaluator_options)
    except ValueError as error:
        raise RecipeError(f"train.evaluator: {error}") from error


def eval_data(samples: AnyDataset, processor: DetrelayImageProcessor) -> DetectionDataset:
    """Samples resized as the processor says and encoded, without any augmentation."""
    sides = processor.size["shortest_edge"], processor.size["longest_edge"]
    transform = build_eval_transform(*sides)
    shapes = [resized_shape(height, width, *sides) for height, width in samples.sizes.tolist()]
    return DetectionDataset(samples, transform, processor, seed=0, shapes=shapes)


def build_model(
    recipe: Recipe, categories: Sequence[Category], init: Path | None = None, *, fresh: bool = True
) -> DetectorForObjectDetection:
    """The recipe's model for these categories.

    Args:
        recipe: what to build.
        categories: such as `build_datasets(recipe.data)[0].categories`.
        init: folder of a saved model, or its name on the Hub, whose weights to start from.
        fresh: False to load neither the backbone's pre-trained weights nor `init`.

    Raises:
        ValueError: the head rejects its settings, or the model in `init` is incomplete.
    """
    entry = head_entry(recipe.head)
    config = model_config(
        recipe,
        entry,
        id2label={index: category.name for index, category in enumerate(categories)},
        label2id={category.name: index for index, category in enumerate(categories)},
        category_ids=[category.id for category in categories],
    )
    if fresh and init is not None:
        return start_from_saved(entry, config, init)
    model = entry.model(config)
    if fresh:
        model.load_backbone_weights(recipe.train.backbone_weights)
    return model


def build_trainer(
    recipe: Recipe,
    train: TrainDataset,
    val: AnyDataset,
    model: DetectorForObjectDetection,
    criterion: Criterion,
    output: str | Path,
    *,
    accelerator: accelerate.Accelerator | None = None,
) -> Trainer:
    """A trainer whose `fit()` trains, evaluates, and keeps the best model in `output`.

    Args:
        recipe: schedule, augmentation and bookkeeping.
        train: images to learn from.
        val: images to evaluate on.
        model: with the classes of the data.
        criterion: the losses with their assigners.
        output: folder of the run; must not contain another one.
        accelerator: device, precision and processes; one with the recipe's precision if None.

    Raises:
        RunFolderError: the folder contains another run.
    """
    from detrelay.apps.drawing import Reporter
    from detrelay.apps.resume import refuse_another_run

    output = Path(output)
    refuse_another_run(output)
    if accelerator is None:
        accelerator = accelerate.Accelerator(mixed_precision=recipe.train.mixed_precision)
    facts = facts_of_run(recipe, None, "build_trainer")
    facts["data"] = facts_of_data(train, val)
    trainer = Trainer(
        accelerator,
        join_parts(recipe, train, val, model, criterion),
        recipe.train,
        num_workers=recipe.data.num_workers,
        output=output,
        record=facts,
        on_evaluation=Reporter(output, val),
    )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        run_folder.write_record(output, facts)
    return trainer


def facts_of_run(recipe: Recipe, init: Path | None, command: str) -> dict[str, Any]:
    """Everything needed to reproduce a saved model, for `training.json`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "recipe": recipe.to_mapping(),
        "assigner": recipe.assigner.name or head_entry(recipe.head).assigner,
        "init": None if init is None else str(init),
        "command": command,
        "device": device,
        **facts_of_program(),
    }


def facts_of_data(train: TrainDataset, val: AnyDataset) -> dict[str, Any]:
    """Fingerprints of the splits, for `--resume`; drawn images are determined by the recipe."""
    splits = {"train": train, "val": val}
    return {
        name: fingerprint(samples.annotations)
        for name, samples in splits.items()
        if isinstance(samples, AnnotatedImages)
    }


def facts_of_program() -> dict[str, Any]:
    """The code version that a model folder was written with."""
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def _commit() -> str | None:
    """The commit of this checkout, marked if files differ from it; None outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
