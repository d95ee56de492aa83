"""What a recipe says about the data: images, annotations and augmentation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from detrelay.core.data.formats import MAX_PIXELS
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.validation import STRICT, convert

OnBadImage = Literal["stop", "skip"]
Count = Annotated[int, Interval(ge=1)]
NonNegative = Annotated[int, Interval(ge=0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Scale = Annotated[float, Interval(ge=0.01)]
_COCO_SHORT_SIDE, _COCO_LONG_SIDE = 800, 1333
# settings that are image sides, and the smallest useful one
_SIDES = (
    *("short_sides", "max_size", "crop_short_sides", "crop_range", "jitter_size", "tile_size"),
    *("eval_short_side", "eval_max_size"),
)
_SMALLEST_SIDE = 8  # pixels


@dataclass(frozen=True)
class DataConfig:
    """Images, annotations and augmentation. Paths are relative to the working directory.

    Attributes:
        train_annotations: file or folder to train on, in any format of docs/data.md, which may be
            named before a colon (`voc:cells`); None for drawn shapes.
        train_images: folder of its images; None to look near the json file.
        val_annotations: the same to evaluate on; None for the held-out split next to the training
            data, or a share of the training images if there is none.
        val_images: folder of its images; None to look near the json file.
        val_share: share of the training images to hold out if there is no other validation data.
        val_seed: selects these images; independent of the training seed.
        num_train: drawn images to train on (drawn shapes only).
        num_val: drawn images to evaluate on (drawn shapes only).
        image_size: side of a drawn image, pixels (drawn shapes only).
        categories: names of the categories to train on; empty for all. All images are kept.
        keep_unused_categories: also have a class for categories without training boxes.
        strict: reject annotations that would otherwise be repaired or dropped with a count.
        num_workers: loader processes per training process; 0 loads in the training process.
        flip_probability: chance of a horizontal flip; 0.5 in DETR and its descendants.
        short_sides: short sides to choose from in training, pixels; one value is a fixed size.
        max_size: limit of the long side in training, pixels.
        multi_scale_by_step: draw one size for all images of a step, as RT-DETR and D-FINE do, and
            not one for each image.
        multi_scale_epochs: epochs after which training images have the size of evaluation; 0 for
            never.
        crop: DETR's scheme: half of the images are resized, cropped and resized again.
        crop_short_sides: short sides to choose from before a crop, pixels (DETR).
        crop_range: minimum and maximum side of a crop, pixels (DETR).
        jitter_size: side of the square of large-scale jitter, which replaces resizes and crops,
            pixels; 1024 in the paper; 0 for none.
        jitter_range: minimum and maximum scale of the large-scale jitter.
        mosaic: chance that four images are combined into one; 0 in the papers.
        mixup: chance that an image (or a mosaic) is blended with another; 0 in the papers of the
            published recipes.
        strong_epochs: epochs after which mosaic, mixup, "photometric_distort" and "iou_crop" stop,
            as in the recipes of RT-DETR's successors; 0 for never.
        color_jitter: strength of random brightness, contrast and saturation; 0 in the papers.
        transforms: transforms of a training image, in this order, as tables with a `name`, a key of
            `TRANSFORMS` or module:Class for a custom one, and its options; empty for flip, then
            crop and resize or jitter, then colours, with the settings above. Omitted options are
            taken from those settings. `epochs` in a table ends its transform after so many epochs.
            Mosaic and mixup, if only asked for by the settings above, come first.
        tile_size: side of the overlapping tiles that training images are cut into, pixels; each
            tile is then an image of its own; 0 for whole images.
        tile_overlap: minimum share of a tile that the next one shows too.
        tile_visible: minimum share of a box that a tile must show to keep it.
        tile_empty: also train on tiles without any box.
        aspect_group: how many consecutive training images are all wide or all high. A value equal
            to `train.batch_size` minimises padding; the order does not depend on the batch size.
        batch_by_shape: batches hold images of similar aspect ratio that share their random size,
            which leaves little padding; replaces `aspect_group`. The order depends on
            `train.batch_size`.
        stream: read the training images (`hub` format) as a stream, row by row, for data sets that
            are too large for the disk; an epoch is a pass over the rows.
        stream_buffer: rows that each loader worker holds, of which the next one is drawn.
        stream_rows: number of rows of the stream; 0 for the number that the data set states.
        keep_empty: also train on images without any annotation, as DETR and its descendants do.
        on_bad_image: an image that cannot be read in training ends the run ("stop"), or is
            reported and replaced by the next one ("skip"). In evaluation it always ends it.
        max_pixels: largest number of pixels of an image file; a larger one cannot be read.
        allow_outside: also read images whose `file_name` points outside the image folder.
        eval_short_side: short side in evaluation, pixels.
        eval_max_size: limit of the long side in evaluation, pixels.
        pad_size_divisor: the sides of a padded batch are multiples of it, pixels; `--init` uses the
            model's.
    """

    __pydantic_config__: ClassVar = STRICT

    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    val_share: Fraction = 0.1
    val_seed: NonNegative = 0
    num_train: Count = 2000
    num_val: Count = 200
    image_size: Annotated[int, Interval(ge=32)] = 160
    categories: tuple[str, ...] = ()
    keep_unused_categories: bool = True
    strict: bool = False
    num_workers: NonNegative = 2
    flip_probability: Fraction = 0.5
    short_sides: tuple[Count, ...] = (_COCO_SHORT_SIDE,)
    max_size: Count = _COCO_LONG_SIDE
    multi_scale_by_step: bool = False
    multi_scale_epochs: NonNegative = 0
    crop: bool = False
    crop_short_sides: tuple[Count, ...] = (400, 500, 600)
    crop_range: tuple[Count, Count] = (384, 600)
    jitter_size: NonNegative = 0
    jitter_range: tuple[Scale, Scale] = (0.1, 2.0)
    mosaic: Fraction = 0.0
    mixup: Fraction = 0.0
    strong_epochs: NonNegative = 0
    color_jitter: Fraction = 0.0
    transforms: tuple[dict[str, Any], ...] = ()
    tile_size: NonNegative = 0
    tile_overlap: Annotated[float, Interval(ge=0, lt=1)] = 0.2
    tile_visible: Fraction = 0.3
    tile_empty: bool = False
    aspect_group: Count = 1
    batch_by_shape: bool = False
    stream: bool = False
    stream_buffer: Count = 1000
    stream_rows: NonNegative = 0
    keep_empty: bool = True
    on_bad_image: OnBadImage = "stop"
    max_pixels: Count = MAX_PIXELS
    allow_outside: bool = False
    eval_short_side: Count = _COCO_SHORT_SIDE
    eval_max_size: Count = _COCO_LONG_SIDE
    pad_size_divisor: Count = 32

    @property
    def mosaic_tile(self) -> int:
        """Side of the square that each image of a mosaic is fitted into, pixels."""
        return self.jitter_size or max(self.short_sides)

    def check(self) -> None:
        """Check settings that did not come from a recipe, which checks its own.

        Raises:
            RecipeError: a value has the wrong type or is out of range, or values are inconsistent.
        """
        source = "settings of the data"
        convert(DataConfig, asdict(self), source)
        check_data(self, source)


def check_data(data: DataConfig, source: str) -> None:
    """Reject settings that are valid on their own but inconsistent.

    Args:
        data: the settings.
        source: where they come from, for messages.

    Raises:
        RecipeError: they are.
    """
    if not data.short_sides:
        raise RecipeError(f"{source}: data.short_sides must have at least one value")
    if data.crop and not data.crop_short_sides:
        raise RecipeError(f"{source}: data.crop_short_sides must have at least one value")
    for key in _SIDES:
        value = getattr(data, key)
        side = min(value) if isinstance(value, tuple) else value
        if side < _SMALLEST_SIDE and (side or key not in ("jitter_size", "tile_size")):
            raise RecipeError(
                f"{source}: data.{key} must be at least {_SMALLEST_SIDE} pixels, found {side}"
            )
    if data.max_size < max(data.short_sides):
        raise RecipeError(
            f"{source}: data.max_size ({data.max_size}) must be at least the largest of "
            f"data.short_sides"
        )
    for key in ("crop_range", "jitter_range"):
        if getattr(data, key)[0] > getattr(data, key)[1]:
            raise RecipeError(f"{source}: data.{key} must be [minimum, maximum]")
    if data.crop and data.jitter_size:
        raise RecipeError(f"{source}: data.crop and data.jitter_size exclude each other")
    if data.tile_size and data.train_annotations is None:
        raise RecipeError(f"{source}: data.tile_size cuts images of data.train_annotations only")
    if data.stream:
        _check_stream(data, source)


_JOINING = ("mosaic", "mixup", "paste")  # transforms that take other images


def _check_stream(data: DataConfig, source: str) -> None:
    """Reject what needs access to any image at any time."""
    if data.train_annotations is None:
        raise RecipeError(f"{source}: data.stream needs data.train_annotations")
    default = DataConfig()
    needs_access = (
        *("train_images", "keep_unused_categories", "mosaic", "mixup", "tile_size"),
        *("aspect_group", "batch_by_shape", "multi_scale_by_step", "keep_empty", "on_bad_image"),
    )
    asked = [key for key in needs_access if getattr(data, key) != getattr(default, key)]
    if {str(entry.get("name")) for entry in data.transforms}.intersection(_JOINING):
        asked.append(f"transforms ({', '.join(_JOINING)})")
    if asked:
        raise RecipeError(
            f"{source}: data.stream reads each row once, in turn, which excludes "
            f"{', '.join(f'data.{key}' for key in asked)}; leave out one or the other"
        )
