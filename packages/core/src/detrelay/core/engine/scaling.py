"""Learning rate and number of images per step, compared with the published ones."""

from __future__ import annotations

import math
from dataclasses import replace

from detrelay.core.recipes.recipe import ScalingRule, TrainConfig

_RULES: tuple[ScalingRule, ...] = ("linear", "sqrt")


def scaled_learning_rate(settings: TrainConfig, images_per_step: int, rule: ScalingRule) -> float:
    """The recipe's learning rate for another number of images per step.

    Args:
        settings: its `learning_rate` belongs to `published_batch_size` images.
        images_per_step: over all processes and accumulated batches.
        rule: "linear" keeps rate / images (Goyal et al., 2017), "sqrt" rate / sqrt(images), which
            suits Adam (Malladi et al., 2022), "none" the rate.

    Raises:
        ValueError: a rule is set but `published_batch_size` is not.
    """
    if rule == "none":
        return settings.learning_rate
    if settings.published_batch_size is None:
        raise ValueError(
            f'train.scale_learning_rate="{rule}" needs train.published_batch_size, the images per '
            f"step that train.learning_rate belongs to"
        )
    ratio = images_per_step / settings.published_batch_size
    return settings.learning_rate * (ratio if rule == "linear" else math.sqrt(ratio))


def with_scaled_rate(settings: TrainConfig, images_per_step: int) -> TrainConfig:
    """The settings with the learning rate of their scaling rule."""
    rate = scaled_learning_rate(settings, images_per_step, settings.scale_learning_rate)
    return replace(settings, learning_rate=rate)


def describe_step(settings: TrainConfig, num_processes: int) -> str:
    """One line: images per step and learning rate, next to those of the recipe."""
    images = num_processes * settings.batch_size * settings.accumulation_steps
    rate = with_scaled_rate(settings, images).learning_rate
    line = (
        f"step: {images} images ({num_processes} process(es) x {settings.batch_size} images x "
        f"{settings.accumulation_steps} pass(es)), learning rate {rate:.3g}"
    )
    published = settings.published_batch_size
    if published is None:
        return line
    line += f"; published: {published} images, learning rate {settings.learning_rate:.3g}"
    if images != published and settings.scale_learning_rate == "none":
        linear, root = (scaled_learning_rate(settings, images, rule) for rule in _RULES)
        line += f" (train.scale_learning_rate=linear makes it {linear:.3g}, sqrt {root:.3g})"
    return line
