"""Transforms of training images by name: the one place where a new one is entered.

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
from detrelay.core.data.geometry import (
    make_mosaic,
    mix,
    on_both,
    random_crop,
    resize,
    scale,
    turn_left,
)
from detrelay.core.data.paste import Paste
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import DataConfig
from detrelay.core.registry import find_part, make_part

Transform = Callable[[Sample], Sample]
Another = Callable[[], Sample]


@dataclass(frozen=True)
class Flip:
    """Horizontal flip.

    Attributes:
        probability: chance of a flip.
    """

    probability: float

    def __call__(self, sample: Sample) -> Sample:
        """Flip image and boxes, or return the sample as it is."""
        return on_both(tv_functional.horizontal_flip, sample) if self.is_due() else sample

    def is_due(self) -> bool:
        """Whether the next image is mirrored; draws one random number."""
        return bool(torch.rand(()) < self.probability)


@dataclass(frozen=True)
class VerticalFlip:
    """Vertical flip, for pictures without an upper side: from above, or through a microscope.

    Attributes:
        probability: chance of a flip.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def __call__(self, sample: Sample) -> Sample:
        """Flip image and boxes, or return the sample as it is."""
        due = bool(torch.rand(()) < self.probability)
        return on_both(tv_functional.vertical_flip, sample) if due else sample


@dataclass(frozen=True)
class QuarterTurn:
    """Rotation by 90 degrees, for pictures that may be taken from any side.

    Attributes:
        probability: chance of a turn, of which half are to the left.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def __call__(self, sample: Sample) -> Sample:
        """Turn image and boxes, or return the sample as it is."""
        draw = float(torch.rand(()))
        if draw >= self.probability:
            return sample
        return turn_left(sample, 1 if draw < self.probability / 2 else 3)


@dataclass(frozen=True)
class Resize:
    """Resize to a random short side.

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
    """DETR's scheme, to precede a `Resize`: resize, then crop a random window.

    Attributes:
        short_sides: sizes before the crop, pixels.
        window: minimum and maximum side of the window, pixels; the image bounds both.
        probability: chance of a crop.
    """

    short_sides: Sequence[int]
    window: Sequence[int]
    probability: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        """Resize and crop image and boxes, or return the sample as it is."""
        if torch.rand(()) < self.probability:
            sample = resize(sample, _choose(self.short_sides), None)
            return random_crop(sample, self.window[0], self.window[1])
        return sample


@dataclass(frozen=True)
class ScaleJitter:
    """Large-scale jitter, instead of a resize: a random scale, then a random crop.

    Attributes:
        size: side of the square that scale 1 fits the image into, and that bounds the crop, pixels.
        scales: minimum and maximum scale.

    Reference:
        Ghiasi et al., Simple Copy-Paste, CVPR 2021, who pad to the square; here batches are padded
        to their largest image, as usual.
    """

    size: int
    scales: Sequence[float]

    def __call__(self, sample: Sample) -> Sample:
        """Scale and crop image and boxes."""
        low, high = self.scales
        draw = float(torch.rand(())) if sample.size_draw is None else sample.size_draw
        factor = low + (high - low) * draw
        sample = scale(sample, factor * self.size / max(sample.image.shape[-2:]))
        return random_crop(sample, self.size, self.size)


class ColorJitter:
    """Random brightness, contrast and saturation.

    Args:
        strength: maximum relative change of each.
    """

    def __init__(self, strength: float) -> None:
        self.change = v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength)

    def __call__(self, sample: Sample) -> Sample:
        """Jitter the colours of the image."""
        return replace(sample, image=self.change(sample.image))


class PhotometricDistort:
    """SSD's random brightness, contrast, saturation, hue and order of channels.

    Args:
        probability: chance of each; 0.5 in RT-DETR.
    """

    def __init__(self, probability: float = 0.5) -> None:
        self.change = v2.RandomPhotometricDistort(p=probability)

    def __call__(self, sample: Sample) -> Sample:
        """Distort the colours of the image."""
        return replace(sample, image=self.change(sample.image))


class IouCrop:
    """SSD's random crop with a minimum overlap; objects with their centre outside are dropped.

    Args:
        probability: chance of a crop; 0.8 in RT-DETR.
    """

    def __init__(self, probability: float = 0.8) -> None:
        self.probability = probability
        self.crop = v2.RandomIoUCrop()
        self.keep = v2.SanitizeBoundingBoxes()  # boxes outside the crop are left without area

    def __call__(self, sample: Sample) -> Sample:
        """Crop image and boxes, or return the sample as it is."""
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
class Mosaic:
    """Four images on one canvas; see `make_mosaic`.

    Attributes:
        probability: chance of a mosaic.
        tile: side of the square that each image is fitted into, pixels.
    """

    probability: float
    tile: int

    def __post_init__(self) -> None:
        _check_probability(self.probability)
        if type(self.tile) is not int or self.tile < _SMALLEST_TILE:
            raise ValueError(f"tile must be at least {_SMALLEST_TILE} pixels, found {self.tile}")

    def join(self, sample: Sample, another: Another) -> Sample:
        """A mosaic of the image and three others, or the sample as it is."""
        if torch.rand(()) < self.probability:
            return make_mosaic([sample, *(another() for _ in range(3))], self.tile)
        return sample


@dataclass(frozen=True)
class Mixup:
    """Two images blended; see `mix`.

    Attributes:
        probability: chance of a blend.
    """

    probability: float

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def join(self, sample: Sample, another: Another) -> Sample:
        """The image blended with another, or the sample as it is."""
        return mix(sample, another()) if torch.rand(()) < self.probability else sample


Joining = Mosaic | Mixup | Paste  # what takes other images


@dataclass(frozen=True)
class Step:
    """An entry of the list of transforms.

    Attributes:
        transform: what happens to a sample.
        epochs: number of epochs after which that ends; 0 for never.
        late: what replaces it then; None for nothing.
    """

    transform: Transform | Joining
    epochs: int = 0
    late: Transform | None = None


@dataclass(frozen=True)
class Augmentation:
    """A sequence of transforms.

    Attributes:
        steps: in the order in which they are applied.
    """

    steps: tuple[Step, ...]

    def __call__(self, sample: Sample, epoch: int = 0, another: Another | None = None) -> Sample:
        """Apply them all.

        Args:
            sample: an image with its objects.
            epoch: number of the epoch, from 0.
            another: reads another sample at random, untransformed; needed by mosaic, mixup, paste.
        """
        for step in self.steps:
            ended = step.epochs and epoch >= step.epochs
            transform = step.late if ended else step.transform
            if isinstance(transform, Joining):
                assert another is not None
                sample = transform.join(sample, another)
            elif transform is not None:
                sample = transform(sample)
        return sample


TRANSFORMS: dict[str, Callable[..., Transform | Joining]] = {
    "mosaic": Mosaic,
    "mixup": Mixup,
    "paste": Paste,
    "flip": Flip,
    "vertical_flip": VerticalFlip,
    "quarter_turn": QuarterTurn,
    "crop": Crop,
    "resize": Resize,
    "scale_jitter": ScaleJitter,
    "color_jitter": ColorJitter,
    "photometric_distort": PhotometricDistort,
    "iou_crop": IouCrop,
}
# `strong_epochs` ends them
_STRONG = frozenset({"mosaic", "mixup", "photometric_distort", "iou_crop"})
# `multi_scale_epochs` replaces them with the size of evaluation
_SIZES = frozenset({"resize", "scale_jitter"})
# must be listed if a setting asks for them
_OPTIONAL = frozenset({"crop", "scale_jitter", "color_jitter"})
_SMALLEST_TILE = 8  # pixels


def build_train_transform(config: DataConfig) -> Augmentation:
    """The transforms that `config.transforms` lists, or those that its other settings ask for.

    Options that an entry omits are taken from the settings of the same thing: the size of "resize"
    is that of `short_sides` and `max_size`.

    Args:
        config: settings of the data.

    Raises:
        RecipeError: settings that are out of range or inconsistent, or an unknown transform.
    """
    config.check()
    listed = config.transforms or tuple({"name": name} for name in _asked_for(config))
    names = [str(entry.get("name")) for entry in listed]
    if forgotten := [
        name for name in _asked_for(config) if name not in names and name in _OPTIONAL
    ]:
        raise RecipeError(
            f"data.transforms leaves out {', '.join(forgotten)}, which other settings of data ask "
            f"for; list it, or reset these settings"
        )
    joining = {"mosaic": config.mosaic, "mixup": config.mixup}
    first = [{"name": name} for name, chance in joining.items() if chance and name not in names]
    try:
        steps = tuple(_build(entry, config) for entry in (*first, *listed))
    except ValueError as error:
        raise RecipeError(f"data.transforms: {error}") from error
    _check_multi_scale(config, steps)
    return Augmentation(steps)


def _asked_for(config: DataConfig) -> list[str]:
    """Names of the transforms that the settings outside the list ask for, in order."""
    names = ["flip"]
    if config.jitter_size:
        names.append("scale_jitter")
    else:
        names += ["crop", "resize"] if config.crop else ["resize"]
    return [*names, "color_jitter"] if config.color_jitter > 0 else names


def _build(entry: Mapping[str, Any], config: DataConfig) -> Step:
    options = dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'each entry needs a name, such as {{name = "flip"}}; found {dict(entry)}')
    usual = config.strong_epochs if name in _STRONG else 0
    epochs = options.pop("epochs", config.multi_scale_epochs if name in _SIZES else usual)
    if type(epochs) is not int or epochs < 0:
        raise ValueError(f"transform {name!r}: epochs must be a number from 0, found {epochs!r}")
    part = find_part("transform", name, TRANSFORMS)
    transform = make_part("transform", name, part, options, _given(name, config))
    late = Resize((config.eval_short_side,), config.eval_max_size) if name in _SIZES else None
    return Step(transform, epochs, late if epochs else None)


def _given(name: str, config: DataConfig) -> dict[str, Any]:
    """The options of a transform that the settings outside the list give."""
    given: dict[str, dict[str, Any]] = {
        "mosaic": {"tile": config.mosaic_tile},
        "flip": {"probability": config.flip_probability},
        "crop": {"short_sides": config.crop_short_sides, "window": config.crop_range},
        "resize": {"short_sides": config.short_sides, "max_size": config.max_size},
        "scale_jitter": {"size": config.jitter_size, "scales": config.jitter_range},
        "color_jitter": {"strength": config.color_jitter},
    }
    options = given.get(name, {})
    chance = {"mosaic": config.mosaic, "mixup": config.mixup}.get(name)
    return options | {"probability": chance} if chance else options


def _check_multi_scale(config: DataConfig, steps: Sequence[Step]) -> None:
    parts = [step.transform for step in steps]
    sizes = [part for part in parts if isinstance(part, Resize | ScaleJitter)]
    if config.multi_scale_epochs and not sizes:
        raise RecipeError(
            "data.multi_scale_epochs ends random sizes, but data.transforms has neither "
            "'resize' nor 'scale_jitter'"
        )
    drawn = any(isinstance(part, ScaleJitter) or len(part.short_sides) > 1 for part in sizes)
    if config.multi_scale_by_step and not drawn:
        raise RecipeError(
            "data.multi_scale_by_step draws a size for each step, but there is only one; list "
            "several in data.short_sides"
        )


def _check_probability(value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"probability must lie between 0 and 1, found {value!r}")


def build_eval_transform(short_side: int, max_size: int | None) -> Augmentation:
    """Resize only: short side to `short_side` unless the long side would exceed `max_size`."""
    return Augmentation((Step(Resize((short_side,), max_size)),))


def with_and_without_flip(
    transform: Augmentation,
) -> tuple[Flip | None, tuple[Augmentation, Augmentation]]:
    """The two deterministic variants of transforms whose only randomness is a flip.

    Args:
        transform: as `build_train_transform` and `build_eval_transform` make them.

    Returns:
        The flip, None if there is none; and the transforms of an image that is not flipped, and
        of one that is.

    Raises:
        ValueError: an image has other variants than these two; says which transform makes them.
    """
    flip, rest = None, transform.steps
    if rest and isinstance(rest[0].transform, Flip):
        flip, rest = rest[0].transform, rest[1:]
    for step in rest:
        part = step.transform
        if not isinstance(part, Resize):
            raise ValueError(f"{_name_of(part)} (in data) is none of flip, first, and resize")
        if len(part.short_sides) > 1:
            raise ValueError(
                f"data.short_sides is a choice of {len(part.short_sides)} sizes; expected one"
            )
    if any(step.epochs for step in transform.steps):
        raise ValueError("a transform of data ends after some epochs; expected the same in all")
    never, always = (Augmentation((Step(Flip(chance)), *rest)) for chance in (0.0, 1.0))
    return flip, (never, always)


def _name_of(part: Transform | Joining) -> str:
    names = {kind: name for name, kind in TRANSFORMS.items()}
    return names.get(type(part), type(part).__name__)


def _choose(sizes: Sequence[int], draw: float | None = None) -> int:
    if draw is None:
        return sizes[int(torch.randint(len(sizes), ()))]
    return sizes[int(draw * len(sizes))]
