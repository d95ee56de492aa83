"""The learning rate beside the number of images a step, ours and the published ones."""

from __future__ import annotations

import math
from dataclasses import replace

from detrelay.core.configs import ScalingRule, TrainConfig


def scaled_learning_rate(settings: TrainConfig, images_per_step: int, rule: ScalingRule) -> float:
    """The recipe's learning rate for another number of images a step.

    Args:
        settings: its `learning_rate` is meant for `reference_batch_size` images.
        images_per_step: over all processes and accumulated batches.
        rule: "linear" keeps rate / images (Goyal et al., 2017), "sqrt" rate / sqrt(images), which
            suits Adam (Malladi et al., 2022), "none" the rate.
    """
    ratio = images_per_step / settings.reference_batch_size
    factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]
    return settings.learning_rate * factor


def with_scaled_rate(settings: TrainConfig, images_per_step: int) -> TrainConfig:
    """The settings with the learning rate that their own rule gives."""
    rate = scaled_learning_rate(settings, images_per_step, settings.scale_learning_rate)
    return replace(settings, learning_rate=rate)


def describe_step(settings: TrainConfig, num_processes: int) -> str:
    """One line: images a step and learning rate, ours beside those of the recipe."""
    images = num_processes * settings.batch_size * settings.accumulation_steps
    rate = with_scaled_rate(settings, images).learning_rate
    line = (
        f"step: {images} images ({num_processes} process(es) x {settings.batch_size} images x "
        f"{settings.accumulation_steps} pass(es)), learning rate {rate:.3g}; the recipe's: "
        f"{settings.reference_batch_size} images, learning rate {settings.learning_rate:.3g}"
    )
    if images != settings.reference_batch_size and settings.scale_learning_rate == "none":
        linear, root = (scaled_learning_rate(settings, images, rule) for rule in ("linear", "sqrt"))
        line += f" (train.scale_learning_rate=linear makes it {linear:.3g}, sqrt {root:.3g})"
    return line
