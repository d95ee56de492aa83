"""Cost of detectors: parameters, arithmetic by part, time and memory of inference and training.

detrelay cost table6_coco --output cost
detrelay cost stageinteractor_r50_1x dino_r50_4scale_12e --inference-only --output cost
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, require_positive, run

if TYPE_CHECKING:
    from detrelay.core.detector.model import DetectorForObjectDetection
    from detrelay.core.recipes.recipe import Recipe
    from detrelay.core.structures import Targets

_COCO_CLASSES = 80
_OBJECTS = 7  # the average of a COCO image


@dataclass(frozen=True)
class Arguments:
    """Measure every setting of studies, or recipes, with random weights and images of noise."""

    study: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """Studies or recipes: TOML files, or names of files in the package."""
    output: Path
    """Folder for cost.md and cost.json."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
    ] = ()
    """Recipe values of every row."""
    height: int = 800
    """Height of an image, pixels."""
    width: int = 1344
    """Width of an image, pixels."""
    batch_size: int = 1
    """Images per batch."""
    classes: int = _COCO_CLASSES
    """Number of categories."""
    repeats: int = 3
    """Timed runs per row after a warm-up run; the median counts."""
    inference_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip training steps: losses, gradients and the optimiser's update."""
    debug: Debug = False


@dataclass(frozen=True)
class Use:
    """Time and memory per image.

    Attributes:
        seconds: median time per image.
        mebibytes: peak memory of a whole batch: tensors on a GPU, on a CPU the resident size of a
            process that does nothing else.
    """

    seconds: float
    mebibytes: float


@dataclass(frozen=True)
class Cost:
    """One row.

    Attributes:
        name: of the setting.
        parameters: by part.
        gflop: floating-point operations in matrix products and convolutions for one image, in
            units of 1e9, by part; a multiplication and an addition are two.
        inference: from pixels to boxes.
        training: a whole step; None if not requested.
    """

    name: str
    parameters: dict[str, int]
    gflop: dict[str, float]
    inference: Use
    training: Use | None


def cost(arguments: Arguments) -> int:
    """Measure, print and write; returns the exit code."""
    require_positive(arguments, "height", "width", "batch_size", "classes", "repeats")
    if not arguments.study:
        raise ValueError("name a study or a recipe, such as table6_coco")
    recipes = recipes_of(arguments)
    rows = []
    for name, recipe in recipes.items():
        rows.append(measure(name, recipe, arguments))
        print(f"{name}: measured", flush=True)
    text = f"{conditions(arguments)}\n\n{table(rows)}\n\n{table_by_part(rows)}\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "cost.md").write_text(text, encoding="utf-8")
    content = json.dumps([asdict(row) for row in rows], indent=1)
    (arguments.output / "cost.json").write_text(content + "\n", encoding="utf-8")
    print(f"\n{text}\ncost.md, cost.json -> {arguments.output}")
    return 0


def recipes_of(arguments: Arguments) -> dict[str, Recipe]:
    """The recipe of each row: all settings of studies, and recipes as they are.

    Raises:
        ValueError: a name is neither a study nor a recipe, or a file cannot be used.
    """
    from detrelay.apps.study import STUDIES, make_jobs, read_study, study_file
    from detrelay.apps.study import Arguments as StudyArguments
    from detrelay.apps.train import Arguments as TrainArguments
    from detrelay.apps.train import resolve

    recipes: dict[str, Recipe] = {}
    for name in arguments.study:
        if (STUDIES / f"{name}.toml").is_file() or _is_study(Path(name)):
            plan = read_study(study_file(name))
            jobs = make_jobs(plan, StudyArguments(name, Path("unused"), set=arguments.set))
            for job in jobs[: len(plan.settings)]:
                recipes[f"{Path(name).stem}: {job.setting}"] = resolve(job.arguments)
        else:
            recipes[Path(name).stem] = resolve(TrainArguments(recipe=name, set=arguments.set))
    return recipes


def _is_study(path: Path) -> bool:
    return path.suffix == ".toml" and path.is_file() and "\n[settings" in path.read_text("utf-8")


def measure(name: str, recipe: Recipe, arguments: Arguments) -> Cost:
    """All figures of a recipe; time and memory in separate processes."""
    inference, parameters, operations = in_own_process(infer, recipe, arguments)
    return Cost(
        name=name,
        parameters=parameters,
        gflop={part: value / 1e9 for part, value in operations.items()},
        inference=inference,
        training=None if arguments.inference_only else in_own_process(train, recipe, arguments),
    )


def in_own_process(work: Callable[[Recipe, Arguments], Any], *given: Any) -> Any:
    """The result of a function run in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *given).result()


def build(recipe: Recipe, arguments: Arguments) -> DetectorForObjectDetection:
    """The recipe's model with random weights, on the GPU if there is one."""
    import torch

    from detrelay.apps.build import build_model
    from detrelay.core.data.coco import Category

    torch.manual_seed(0)
    categories = [Category(index, f"class {index}") for index in range(arguments.classes)]
    return build_model(recipe, categories, None, fresh=False).to(device())


def device() -> Any:
    """The GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def infer(recipe: Recipe, arguments: Arguments) -> tuple[Use, dict[str, int], dict[str, int]]:
    """Time and memory from pixels to boxes; parameters and operations of one image, by part."""
    import torch

    from detrelay.core.detector.cost import operations_by_part, parameters_by_part

    model = build(recipe, arguments).eval()
    size = (arguments.height, arguments.width)
    pixels = torch.rand(arguments.batch_size, 3, *size, device=device())
    with torch.no_grad():
        use = repeated(lambda: model(pixel_values=pixels), arguments)
    return use, parameters_by_part(model), operations_by_part(model, pixels[:1])


def train(recipe: Recipe, arguments: Arguments) -> Use:
    """Time and memory of a step: predictions, losses, gradients, update."""
    import torch

    from detrelay.apps.build import build_criterion
    from detrelay.core.detector.checkpointing import checkpoint_activations
    from detrelay.core.engine.optimizer import build_optimizer

    model, criterion = build(recipe, arguments).train(), build_criterion(recipe)
    if recipe.train.activation_checkpointing:
        checkpoint_activations(model)
    optimizer = build_optimizer(model, recipe.train)
    size = (arguments.height, arguments.width)
    pixels = torch.rand(arguments.batch_size, 3, *size, device=device())
    targets = make_targets(arguments)

    def step() -> None:
        output = model(pixel_values=pixels, targets=targets)
        assert output.groups is not None  # the model is in training
        plan = criterion.plan(output.groups, targets)
        criterion.losses(plan, plan.counts).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return repeated(step, arguments)


def make_targets(arguments: Arguments) -> Targets:
    """Some objects in every image."""
    import torch

    from detrelay.core.structures import Targets

    images = arguments.batch_size
    centres = torch.linspace(0.2, 0.8, _OBJECTS, device=device()).repeat(images)
    return Targets(
        labels=torch.zeros(len(centres), dtype=torch.int64, device=device()),
        boxes=torch.stack([centres, centres, centres / 2, centres / 2], dim=1),
        image=torch.arange(images, device=device()).repeat_interleave(_OBJECTS),
        batch_size=images,
    )


def repeated(action: Callable[[], object], arguments: Arguments) -> Use:
    """Time and memory of an action after a warm-up."""
    import torch

    from detrelay.core.engine.memory import peak_memory_mib

    def timed() -> float:
        start = time.perf_counter()
        action()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    seconds = statistics.median(timed() for _ in range(arguments.repeats))
    return Use(seconds / arguments.batch_size, peak_memory_mib(device()))


def conditions(arguments: Arguments) -> str:
    """The conditions under which the rows were measured."""
    import torch

    name = "CPU"
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    threads = "" if device().type == "cuda" else f", {torch.get_num_threads()} thread(s)"
    return (
        f"Images of {arguments.height} x {arguments.width} pixels, {arguments.batch_size} at a "
        f"time, {arguments.classes} categories, random weights; {name}{threads}, torch "
        f"{torch.__version__}. Memory is the most in use: tensors on a GPU, the whole process on a "
        f"CPU."
    )


def table(rows: Sequence[Cost]) -> str:
    """Markdown: one row per setting."""
    lines = [
        "| setting | parameters, millions | GFLOP | s per image | MiB | s per training image "
        "| MiB in training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            f"{sum(row.parameters.values()) / 1e6:.1f}",
            f"{sum(row.gflop.values()):.1f}",
            f"{row.inference.seconds:.3f}",
            f"{row.inference.mebibytes:.0f}",
            "-" if row.training is None else f"{row.training.seconds:.3f}",
            "-" if row.training is None else f"{row.training.mebibytes:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_by_part(rows: Sequence[Cost]) -> str:
    """Markdown: GFLOP and millions of parameters, one row per part."""
    parts = list(dict.fromkeys(part for row in rows for part in (*row.gflop, *row.parameters)))
    lines = [
        f"| GFLOP (millions of parameters) | {' | '.join(row.name for row in rows)} |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for part in parts:
        cells = [
            f"{row.gflop.get(part, 0):.2f} ({row.parameters.get(part, 0) / 1e6:.2f})"
            if part in row.gflop or part in row.parameters
            else "-"
            for row in rows
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: cost(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
