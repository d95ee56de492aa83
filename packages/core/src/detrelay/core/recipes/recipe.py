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

from detrelay.core.errors import RecipeError
from detrelay.core.recipes.data_config import Count as Count
from detrelay.core.recipes.data_config import DataConfig as DataConfig
from detrelay.core.recipes.data_config import Fraction, NonNegative, check_data
from detrelay.core.recipes.files import parse_value, read_recipe, to_toml
from detrelay.core.recipes.validation import STRICT, convert, unknown_key

MixedPrecision = Literal["no", "bf16", "fp16"]
ScalingRule = Literal["none", "linear", "sqrt"]
Schedule = Literal["multi_step", "cosine"]
Amount = Annotated[float, Interval(ge=0)]


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
    check_data(data, source)
    if list(milestones) != sorted(set(milestones)):
        raise RecipeError(f"{source}: train.milestones must increase, found {list(milestones)}")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
