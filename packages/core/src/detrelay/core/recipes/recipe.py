"""The settings of a training run: typed recipes from TOML files and `key=value` overrides.

What changes weights or inference is in the model's own config; a recipe holds the rest (data,
assigner, losses, schedule) and the values passed to that config. Later ones override earlier ones:
the defaults below, the recipe file, the overrides. The defaults are StageInteractor's published
ResNet-50 schedule of 12 epochs. The libraries that check and write are imported lazily, so that
commands can use this module and still answer `--help` at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from annotated_types import Interval

from detrelay.core.data.formats import MAX_PIXELS
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.files import parse_value, read_recipe, to_toml
from detrelay.core.recipes.validation import STRICT, convert, unknown_key

MixedPrecision = Literal["no", "bf16", "fp16"]
ScalingRule = Literal["none", "linear", "sqrt"]
OnBadImage = Literal["stop", "skip"]
Schedule = Literal["multi_step", "cosine"]
Count = Annotated[int, Interval(ge=1)]
NonNegative = Annotated[int, Interval(ge=0)]
Amount = Annotated[float, Interval(ge=0)]
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
class AssignerSettings:
    """How queries are matched to objects in training; does not affect the model itself.

    Attributes:
        name: entry of the assigner table, or `module:Class`; None for the default.
        options: keyword arguments of that assigner, such as `iou_threshold`.
        costs: matching costs, each as "name", "name:weight", or a table with `name`, `weight` and
            the cost's own arguments; names as in the cost table, or `module:Class`. Empty for the
            published ones. An assigner with a base passes them on to it.
        base: the assigner that this one builds on; None for the default.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    costs: tuple[Any, ...] = ()
    base: AssignerSettings | None = None


@dataclass(frozen=True)
class GroupSettings:
    """How one of a head's stage groups learns.

    Attributes:
        assigner: its training targets; None for the default. The decoder's are set in `assigner`.
        joins: name of the group whose assigner assigns this one too, seeing the stages of both.
        weight: factor of its losses in the total.
        loss: loss numbers that differ from those of the other groups; keys as in `loss`.
    """

    assigner: AssignerSettings | None = None
    joins: str | None = None
    weight: Amount = 1.0
    loss: dict[str, Any] = field(default_factory=dict)


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
            taken from those settings. A mosaic comes before the list.
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
        _check_sizes(self, source)


@dataclass(frozen=True)
class TrainConfig:
    """Schedule, optimiser and bookkeeping. Sources: StageInteractor's released configs.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per process and pass.
        published_batch_size: images per step over all processes in the published run, to which
            `learning_rate` belongs; None if nothing was published.
        accumulation_steps: passes whose gradients make one step, as one batch of all their images
            would; each pass then costs a third more. Batch normalisation sees each pass separately.
        learning_rate: of AdamW, after the warm-up.
        scale_learning_rate: how the rate is scaled for a number of images per step other than the
            published one: "none" (not at all), "linear" or "sqrt".
        weight_decay: decoupled decay of AdamW; also on norms and biases if `no_decay` is empty.
        adam_epsilon: added to the root of the second moment in AdamW.
        lr_multipliers: factor on the learning rate of parameters whose name contains the key, in
            which * matches any characters, as in "backbone*norm".
        no_decay: parameters whose name contains one of these keys are not decayed.
        layer_decay: factor on the learning rate from each backbone stage to the one before, and
            from the head to the last stage; 1 is none.
        clip_norm: limit of the L2 norm of all gradients together; 0 for no limit.
        warmup_steps: steps over which the rate rises linearly.
        warmup_share: the same as a share of all steps of the run, if above 0.
        warmup_factor: fraction of the learning rate at step 0.
        schedule: after the warm-up the rate drops at `milestones` ("multi_step"), or falls to 0
            at the end of the last epoch along half a cosine ("cosine").
        milestones: epochs after which the rate drops ("multi_step").
        gamma: factor of each drop ("multi_step").
        ema_decay: decay of the running average of the weights, updated after each step; evaluated
            and published instead of the weights themselves. 0 for none. DINO's code has 0.9997,
            switched off.
        mixed_precision: autocast type of the model; losses are always float32.
        tf32: allow float32 matrix products and convolutions on an NVIDIA GPU to round their inputs
            to TF32, which is several times as fast; None leaves PyTorch's own setting, which
            allows it in convolutions only.
        activation_checkpointing: recompute the layers of head and backbone in the backward pass
            instead of storing their activations; less memory, the same losses.
        compile: speed the model up by torch.compile; the losses stay outside.
        backbone_weights: "imagenet" (downloaded by torchvision, or from the package that carries
            them), "none" or a file.
        feature_cache_gib: memory per process for the feature maps of a frozen backbone, GiB; each
            image and its mirror image are then computed once. 0 for none. Needs an augmentation of
            at most a flip, and one short side.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        early_stopping_patience: consecutive evaluations without a better AP after which the run
            ends; 0 for never.
        checkpoint_every: steps between checkpoints; one is also saved before each evaluation.
        keep_checkpoints: number of newest checkpoints to keep on disk.
        save_on_each_node: every machine saves its own checkpoints; for machines that share no disk.
        log_every: steps between log lines.
        trackers: "tensorboard", "trackio" or "wandb", which receive the same figures as the log.
        max_detections: boxes per image that count in evaluation; 100 in COCO.
        evaluator: what measures the model: "coco", or module:Class for a custom one, whose first
            figure decides which model is the best.
        evaluator_options: arguments of the evaluator, such as `backend` of "coco".
        nms_iou_threshold: in evaluation and in the saved model, boxes of one class that overlap a
            better one by more are suppressed; None suppresses nothing. 0.7 in DETA.
        seed: of weights, order and augmentation.
    """

    epochs: Count = 12
    batch_size: Count = 2
    published_batch_size: Count | None = None
    accumulation_steps: Count = 1
    learning_rate: Amount = 2.5e-5
    scale_learning_rate: ScalingRule = "none"
    weight_decay: Amount = 1e-4
    adam_epsilon: Amount = 1e-10
    lr_multipliers: dict[str, Amount] = field(default_factory=dict)
    no_decay: tuple[str, ...] = ()
    layer_decay: Fraction = 1.0
    clip_norm: Amount = 1.0
    warmup_steps: NonNegative = 500
    warmup_share: Fraction = 0.0
    warmup_factor: Fraction = 0.001
    schedule: Schedule = "multi_step"
    milestones: tuple[Count, ...] = (8, 11)
    gamma: Fraction = 0.1
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    mixed_precision: MixedPrecision = "no"
    tf32: bool | None = None
    activation_checkpointing: bool = False
    compile: bool = False
    backbone_weights: str = "imagenet"
    feature_cache_gib: Amount = 0.0
    evaluate_every: Count = 1
    early_stopping_patience: NonNegative = 0
    checkpoint_every: Count = 1000
    keep_checkpoints: Count = 2
    save_on_each_node: bool = False
    log_every: Count = 50
    trackers: tuple[str, ...] = ()
    max_detections: Count = 100
    evaluator: str = "coco"
    evaluator_options: dict[str, Any] = field(default_factory=dict)
    nms_iou_threshold: Fraction | None = None
    seed: Annotated[int, Interval(ge=0, le=2**31 - 1)] = 0


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run, apart from initial weights.

    Attributes:
        head: entry of the head table.
        model: fields of the head's config that differ from its defaults.
        assigner: the training targets.
        loss: fields that differ from the head's published loss numbers.
        groups: by name, stage groups with other settings; which a head has depends on its settings
            ("decoder", "proposals", "denoising", ...). "group" applies to each of "group/1",
            "group/2", ... that has no table of its own.
        data: images and augmentation.
        train: schedule and bookkeeping.
    """

    __pydantic_config__: ClassVar = STRICT

    head: str = "stageinteractor"
    model: dict[str, Any] = field(default_factory=dict)
    assigner: AssignerSettings = field(default_factory=AssignerSettings)
    loss: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, GroupSettings] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Recipe:
        """Check and convert nested values.

        Args:
            values: tables as read from TOML or JSON; missing keys keep their defaults.
            source: where they come from, for messages.

        Raises:
            RecipeError: unknown key, wrong type or value out of range.
        """
        recipe = convert(cls, values, source)
        _check_relations(recipe, source)
        return recipe

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, as in JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def to_toml(self) -> str:
        """The resolved recipe as a TOML file that reads back equal; unset values are omitted."""
        return to_toml(self.to_mapping())


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Resolve defaults, a recipe file and overrides, in this order.

    Args:
        path: TOML file, which may extend others, see `read_recipe`; None for the defaults.
        overrides: "dotted.key=value" strings; values are written as in TOML, plain words without
            quotes.

    Raises:
        RecipeError: the file cannot be read or parsed, or a key or value is rejected.
    """
    if path is None:
        return override(Recipe(), overrides)

    values = read_recipe(path, lambda own, source: convert(Recipe, own, source))
    return override(Recipe.from_mapping(values, str(path)), overrides)


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """A recipe with "dotted.key=value" strings applied in order.

    Raises:
        RecipeError: an assignment is malformed, its key unknown or its value rejected.
    """
    for assignment in assignments:
        values = recipe.to_mapping()
        key, equals, text = assignment.partition("=")
        source = f"--set {assignment}"
        if len(assignment.splitlines()) > 1:
            raise RecipeError(f"--set {assignment!r}: expected key=value on one line")
        if not equals or not key:
            raise RecipeError(f"{source}: expected key=value, such as train.epochs=12")
        _assign(values, key.strip(), parse_value(text.strip(), source), source)
        recipe = convert(Recipe, values, source)
    _check_relations(recipe, "--set")
    return recipe


def differences(first: Recipe, second: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values (None where absent)."""
    before, after = _flatten(first.to_mapping()), _flatten(second.to_mapping())
    keys = [*before, *(key for key in after if key not in before)]
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _assign(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set a dotted key to `value`; inside a free-form table the rest of the key is one name."""
    hint: Any = Recipe
    rest = key
    while True:
        name, dot, rest = rest.partition(".")
        if is_dataclass(hint):
            hints = get_type_hints(hint)
            if name not in hints:
                raise RecipeError(f"{source}: {unknown_key(Recipe, key)}")
            hint = _table_in(hints[name])
        elif get_origin(hint) is dict:
            inner = get_args(hint)[1]
            if not is_dataclass(inner):
                values[name + dot + rest] = value
                return
            hint = inner
        else:
            raise RecipeError(f"{source}: {unknown_key(Recipe, key)}")
        if not dot:
            values[name] = value
            return
        if values.get(name) is None:
            values[name] = {}
        values = values[name]


def _table_in(hint: Any) -> Any:
    """The dataclass in an annotation that also allows None; others unchanged."""
    tables = [item for item in get_args(hint) if is_dataclass(item)]
    return tables[0] if tables and get_origin(hint) is not dict else hint


def _check_relations(recipe: Recipe, source: str) -> None:
    """Reject values that are valid on their own but inconsistent."""
    data, milestones = recipe.data, recipe.train.milestones
    if data.train_annotations is None and data.val_annotations is not None:
        raise RecipeError(f"{source}: data.val_annotations needs data.train_annotations")
    _check_sizes(data, source)
    if list(milestones) != sorted(set(milestones)):
        raise RecipeError(f"{source}: train.milestones must increase, found {list(milestones)}")


def _check_sizes(data: DataConfig, source: str) -> None:
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


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
