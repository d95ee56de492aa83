"""Transforms of training by name: the one place where a new one is entered.

Everything random comes from torch's default CPU generator, whose state `DetectionDataset` sets by
visit. Transforms are classes and not closures: loaders that start their workers afresh, as on macOS
and Windows, must be able to pickle them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv_functional

from detrelay.core.data.coco import Sample
from detrelay.core.data.geometry import on_both, random_crop, resize, scale
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import DataConfig
from detrelay.core.registry import find_part, make_part

Transform = Callable[[Sample], Sample]


@dataclass(frozen=True)
class Flip:
    """A mirror image, left to right.

    Attributes:
        probability: how often.
    """

    probability: float

    def __call__(self, sample: Sample) -> Sample:
        """Flip image and boxes, or return the sample as it is."""
        return on_both(tv_functional.horizontal_flip, sample) if self.is_due() else sample

    def is_due(self) -> bool:
        """Whether the next image is mirrored; draws one random number."""
        return bool(torch.rand(()) < self.probability)


@dataclass(frozen=True)
class Resize:
    """A short side of a random size.

    Attributes:
        short_sides: sizes to choose from, pixels.
        max_size: the long side stays within this, pixels; None for no limit.
    """

    short_sides: Sequence[int]
    max_size: int | None

    def __call__(self, sample: Sample) -> Sample:
        """Resize image and boxes."""
        return resize(sample, _choose(self.short_sides, sample.size_draw), self.max_size)


@dataclass(frozen=True)
class Crop:
    """DETR's scheme, to stand before a `Resize`: resize, then cut a random window.

    Attributes:
        short_sides: sizes before cutting, pixels.
        window: smallest and largest side of the window, pixels; the image bounds both.
        probability: how often.
    """

    short_sides: Sequence[int]
    window: Sequence[int]
    probability: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        """Resize and cut image and boxes, or return the sample as it is."""
        if torch.rand(()) < self.probability:
            sample = resize(sample, _choose(self.short_sides), None)
            return random_crop(sample, self.window[0], self.window[1])
        return sample


@dataclass(frozen=True)
class ScaleJitter:
    """Large-scale jitter, in place of resizes: a random scale, and a random window of it.

    Attributes:
        size: the image is fitted into a square of this side, pixels, and scaled from there; the
            window is at most this square.
        scales: smallest and largest scale.

    Reference:
        Ghiasi et al., Simple Copy-Paste, CVPR 2021, who pad to the square; here batches are padded
        to their largest image as ever.
    """

    size: int
    scales: Sequence[float]

    def __call__(self, sample: Sample) -> Sample:
        """Scale and cut image and boxes."""
        low, high = self.scales
        draw = float(torch.rand(())) if sample.size_draw is None else sample.size_draw
        factor = low + (high - low) * draw
        sample = scale(sample, factor * self.size / max(sample.image.shape[-2:]))
        return random_crop(sample, self.size, self.size)


class ColorJitter:
    """Random brightness, contrast and saturation.

    Args:
        strength: largest relative change of each.
    """

    def __init__(self, strength: float) -> None:
        self.change = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)

    def __call__(self, sample: Sample) -> Sample:
        """Change the colours of the image."""
        return replace(sample, image=self.change(sample.image))


class PhotometricDistort:
    """Random brightness, contrast, saturation, hue and order of channels, as SSD does it.

    Args:
        probability: how often each of them changes; 0.5 in RT-DETR.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.change = v2.RandomPhotometricDistort(p=probability)

    def __call__(self, sample: Sample) -> Sample:
        """Change the colours of the image."""
        return replace(sample, image=self.change(sample.image))


class IouCrop:
    """SSD's random window that keeps enough of some object, and objects whose centre is inside.

    Args:
        probability: how often; 0.8 in RT-DETR.
    """

    def __init__(self, probability: float = 0.8) -> None:
        self.probability = probability
        self.crop = v2.RandomIoUCrop()
        self.keep = v2.SanitizeBoundingBoxes()  # it leaves boxes outside the window without area

    def __call__(self, sample: Sample) -> Sample:
        """Cut image and boxes, or return the sample as it is."""
        if len(sample.boxes_xyxy) == 0 or torch.rand(()) >= self.probability:
            return sample
        height, width = sample.image.shape[-2:]
        boxes = tv_tensors.BoundingBoxes(
            sample.boxes_xyxy,
            format=tv_tensors.BoundingBoxFormat.XYXY,
            canvas_size=(height, width),
        )
        whole = {
            "image": tv_tensors.Image(sample.image),
            "boxes": boxes,
            "labels": sample.class_labels,
        }
        part = self.keep(self.crop(whole))
        return replace(
            sample,
            image=part["image"].as_subclass(torch.Tensor),
            boxes_xyxy=part["boxes"].as_subclass(torch.Tensor),
            class_labels=part["labels"],
        )


@dataclass(frozen=True)
class InTurn:
    """Several transforms, one after the other.

    Attributes:
        transforms: the first one first.
    """

    transforms: tuple[Transform, ...]

    def __call__(self, sample: Sample) -> Sample:
        """The sample after the last of them."""
        for transform in self.transforms:
            sample = transform(sample)
        return sample


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "flip": Flip,
    "crop": Crop,
    "resize": Resize,
    "scale_jitter": ScaleJitter,
    "color_jitter": ColorJitter,
    "photometric_distort": PhotometricDistort,
    "iou_crop": IouCrop,
}
# `strong_epochs` ends them, as it ends mosaics and mixtures
_STRONG = frozenset({"photometric_distort", "iou_crop"})
# there only where a setting asks for them
_OPTIONAL = frozenset({"crop", "scale_jitter", "color_jitter"})


def build_train_transform(config: DataConfig, *, strong: bool = True) -> Transform:
    """The transforms that `config.transforms` lists, or those that its other settings ask for.

    Args:
        config: settings of the data.
        strong: with the strong ones, as until `config.strong_epochs`.

    What an entry leaves out, it takes from the settings of the same thing: the size of "resize" is
    that of `short_sides` and `max_size`.

    Raises:
        RecipeError: settings that are out of range or wrong together, or an unknown transform.
    """
    config.check()
    listed = config.transforms or tuple({"name": name} for name in _asked_for(config))
    given: dict[str, dict[str, Any]] = {
        "flip": {"probability": config.flip_probability},
        "crop": {"short_sides": config.crop_short_sides, "window": config.crop_range},
        "resize": {"short_sides": config.short_sides, "max_size": config.max_size},
        "scale_jitter": {"size": config.jitter_size, "scales": config.jitter_range},
        "color_jitter": {"strength": config.color_jitter},
    }
    names = [str(entry.get("name")) for entry in listed]
    if forgotten := [
        name for name in _asked_for(config) if name not in names and name in _OPTIONAL
    ]:
        raise RecipeError(
            f"data.transforms leaves out {', '.join(forgotten)}, which other settings of data ask "
            f"for; list it, or take these settings back"
        )
    if not strong:
        listed = tuple(entry for entry in listed if entry.get("name") not in _STRONG)
    try:
        return InTurn(tuple(_build(entry, given) for entry in listed))
    except ValueError as error:
        raise RecipeError(f"data.transforms: {error}") from error


def _asked_for(config: DataConfig) -> list[str]:
    """Names of the transforms that the settings beside the list mean, in their order."""
    names = ["flip"]
    if config.jitter_size:
        names.append("scale_jitter")
    else:
        names += ["crop", "resize"] if config.crop else ["resize"]
    return [*names, "color_jitter"] if config.color_jitter > 0 else names


def _build(entry: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> Transform:
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'each entry needs a name, such as {{name = "flip"}}; found {dict(entry)}')
    part = find_part("transform", name, TRANSFORMS)
    transform: Transform = make_part("transform", name, part, options, given.get(name, {}))
    return transform


def build_eval_transform(short_side: int, max_size: int) -> Transform:
    """Resize only: short side to `short_side` unless the long side would exceed `max_size`."""
    return InTurn((Resize((short_side,), max_size),))


def with_and_without_flip(
    transform: Transform,
) -> tuple[Flip | None, tuple[Transform, Transform]]:
    """Transforms that are not random, of one that is so by its flip only.

    Args:
        transform: as `build_train_transform` and `build_eval_transform` make them.

    Returns:
        The flip, None where no image is ever mirrored; and what happens to an image that is not
        mirrored, and to one that is.

    Raises:
        ValueError: it gives other images than these two; says which part of it does.
    """
    parts = transform.transforms if isinstance(transform, InTurn) else (transform,)
    flip, rest = None, parts
    if parts and isinstance(parts[0], Flip):
        flip, rest = parts[0], parts[1:]
    for part in rest:
        if not isinstance(part, Resize):
            raise ValueError(f"{_name_of(part)} (in data) is none of flip, first, and resize")
        if len(part.short_sides) > 1:
            raise ValueError(
                f"data.short_sides is a choice of {len(part.short_sides)} sizes; expected one"
            )
    never, always = (InTurn((Flip(chance), *rest)) for chance in (0.0, 1.0))
    return flip, (never, always)


def _name_of(part: Transform) -> str:
    names = {kind: name for name, kind in TRANSFORMS.items()}
    return names.get(type(part), type(part).__name__)


def _choose(sizes: Sequence[int], draw: float | None = None) -> int:
    if draw is None:
        return sizes[int(torch.randint(len(sizes), ()))]
    return sizes[int(draw * len(sizes))]
