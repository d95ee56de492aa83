"""Train a detector.

Without arguments it trains a small model on drawn shapes, on whatever device there is:

    accelerate launch apps/train.py --head stageinteractor
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run
from detrelay.apps.launch import make_accelerator, set_threads, with_launch_settings
from detrelay.apps.resume import (
    DATA_PATHS,
    Changes,
    check_data,
    check_recipe,
    listed,
    refuse_another_run,
    stored_recipe,
    stored_record,
)
from detrelay.apps.trackers import check_trackers, start_trackers
from detrelay.core.engine import run_folder
from detrelay.core.engine.atomic_folder import recover, recover_all, write_text
from detrelay.core.errors import RecipeError, unknown_name
from detrelay.core.recipes.recipe import (
    AssignerSettings,
    DataConfig,
    Recipe,
    load_recipe,
    override,
)

# Everything that needs torch is imported when the run starts, so that --help responds at once.
if TYPE_CHECKING:
    from accelerate import Accelerator

    from detrelay.core.engine.parts import Evaluation, TrainingParts
    from detrelay.core.engine.trainer import Trainer

RECIPES = Path(__file__).parent / "recipes"
_DRAWN_SHAPES_RECIPE = "shapes"
_FINE_TUNING_RECIPE = "finetune"
_NOT_FINITE = 1


@dataclass(frozen=True)
class Arguments:
    """Train a detector. Precedence: defaults, then the recipe, then the other options."""

    recipe: str | None = None
    """TOML file, or name of a recipe in the package. Default with --init: the head's finetune
    recipe; without --data and --init: drawn shapes."""
    head: str | None = None
    """Decoder head, such as dino; module:ConfigClass for a custom one."""
    assigner: str | None = None
    """Assigner (matcher), such as cross_stage or hungarian; module:Class for a custom one."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PLACE|train=PLACE val=PLACE")] = ()
    """Folder or file of annotated images in any known format, or one each; hub:NAME on the Hub."""
    output: Path | None = None
    """Folder of the run; default: runs/[RECIPE-]HEAD-ASSIGNER[-seedN]."""
    init: Path | None = None
    """Fine-tune this model: folder or name on the Hub. Provides weights, head and its settings."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue from the newest checkpoint in the output folder, with the recipe stored there."""
    accept_changes: tyro.conf.FlagCreatePairsOff[bool] = False
    """With --resume: continue even if recipe or data differ from those of the run."""
    threads: int | None = None
    """CPU threads of each process; default: OMP_NUM_THREADS, or all usable cores."""
    find_batch_size: tyro.conf.FlagCreatePairsOff[bool] = False
    """Lower train.batch_size until a step fits into memory, with more accumulation in return."""
    seed: int | None = None
    """Seed of weights, order and augmentation."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print recipe, steps, optimiser groups and an estimate of the memory; train nothing."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
    ] = ()
    """Recipe values, such as train.epochs=24 model.num_queries=300."""
    push_to: str | None = None
    """Name on the Hub, USER/MODEL, to publish the best model under after training."""
    push_private: tyro.conf.FlagCreatePairsOff[bool] = False
    """Make the published model visible to the owners only."""
    debug: Debug = False


def resolve(arguments: Arguments) -> Recipe:
    """The recipe of the run with all options applied."""
    output = arguments.output
    if (
        arguments.resume
        and arguments.recipe is None
        and output is not None
        and run_folder.remains_of_a_run(output)
    ):
        recipe = stored_recipe(output)
    elif arguments.init is not None and not arguments.resume:
        recipe = recipe_for_saved(arguments, arguments.init)
    else:
        recipe = load_recipe(recipe_file(arguments))
    if arguments.head is not None and arguments.head != recipe.head:
        if recipe.model and arguments.recipe is not None:
            raise RecipeError(
                f"--head {arguments.head}: the recipe {arguments.recipe} has model settings of "
                f"head {recipe.head}; name a recipe of that head"
            )
        recipe = replace(
            recipe, head=arguments.head, model={}, assigner=AssignerSettings(), groups={}
        )
    if arguments.assigner is not None and arguments.assigner != recipe.assigner.name:
        recipe = replace(recipe, assigner=AssignerSettings(arguments.assigner))
    if arguments.data:
        recipe = replace(recipe, data=named_data(recipe.data, arguments.data))
    if arguments.seed is not None:
        recipe = override(recipe, [f"train.seed={arguments.seed}"])
    return override(recipe, [entry for group in arguments.set for entry in group])


def recipe_for_saved(arguments: Arguments, init: Path) -> Recipe:
    """The recipe for fine-tuning a saved model; the settings of its head are the model's."""
    from detrelay.apps.saved import saved_head, with_saved_settings

    head = saved_head(init, arguments.head)
    recipe = load_recipe(recipe_file(arguments, head))
    if recipe.head != head:
        if arguments.recipe is not None:
            raise RecipeError(
                f"--init {init} is a {head}, but --recipe {arguments.recipe} is for {recipe.head}; "
                f"omit the recipe to fine-tune, or name one for {head}"
            )
        recipe = replace(recipe, head=head)
    return with_saved_settings(recipe, init, with_sizes=arguments.recipe is None)


def recipe_file(arguments: Arguments, saved: str | None = None) -> Path | None:
    """The recipe to read; None for the bare defaults.

    Args:
        arguments: of the command line.
        saved: the head of the model to start from, to choose its fine-tuning recipe.
    """
    name = arguments.recipe
    if name is None and saved is not None:
        own = RECIPES / f"{_FINE_TUNING_RECIPE}_{saved}.toml"
        return own if own.is_file() else RECIPES / "base" / f"{_FINE_TUNING_RECIPE}.toml"
    if name is None:
        own = RECIPES / f"{_DRAWN_SHAPES_RECIPE}_{arguments.head}.toml"
        drawn = own if own.is_file() else RECIPES / f"{_DRAWN_SHAPES_RECIPE}.toml"
        return None if arguments.data else drawn
    if name.endswith(".toml"):
        return Path(name)
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name not in known:
        raise RecipeError(f"--recipe: {unknown_name('recipe', name, known)}")
    return RECIPES / f"{name}.toml"


def named_data(data: DataConfig, paths: tuple[Path, ...]) -> DataConfig:
    """The data settings with the places that --data names."""
    places = [str(path) for path in paths]
    named = dict(place.split("=", 1) for place in places if place.startswith(("train=", "val=")))
    if named and (len(named) < len(places) or "train" not in named):
        raise RecipeError(f"--data: expected train=PLACE val=PLACE, found {' '.join(places)}")
    if not named and len(places) == 1:
        files = [paths[0] / name for name in ("train.json", "val.json")]
        places = list(map(str, files)) if all(file.is_file() for file in files) else places
    if not named and len(places) > 2:
        raise RecipeError(
            f"--data: expected a place, or one to train on and one to evaluate on, found "
            f"{' '.join(places)}"
        )
    train, val = (named["train"], named.get("val")) if named else (*places, None)[:2]
    return replace(
        data, train_annotations=train, val_annotations=val, train_images=None, val_images=None
    )


def train(arguments: Arguments) -> int:
    """Set up and run the training; returns the exit code."""
    notes: list[str] = []
    recipe = with_launch_settings(resolve(arguments), set_keys(arguments), notes.append)
    if arguments.dry_run:
        from detrelay.apps.dry_run import dry_run

        for note in notes:
            print(f"note: {note}")
        names_data = not set_keys(arguments).isdisjoint(DATA_PATHS)
        return dry_run(recipe, needs_data=bool(arguments.data) or names_data)

    from detrelay.apps.build import head_entry
    from detrelay.core.engine.faults import told_in_one_line

    assigner = recipe.assigner.name or head_entry(recipe.head).assigner
    output = arguments.output or Path("runs") / run_name(arguments.recipe, recipe, assigner)
    if arguments.resume and arguments.output is None:
        return train(replace(arguments, output=output))
    check_output(output, recipe, arguments)
    check_trackers(recipe.train.trackers)
    accelerator = make_accelerator(recipe, output)
    for note in notes:
        accelerator.print(f"note: {note}", flush=True)
    command = f"detrelay train --resume --output {shlex.quote(str(output))}"
    with ExitStack() as held, told_in_one_line(accelerator, command):
        return run_training(recipe, arguments, output, accelerator, held)


def run_training(
    recipe: Recipe,
    arguments: Arguments,
    output: Path,
    accelerator: Accelerator,
    held: ExitStack,
) -> int:
    """Train on the available devices; returns the exit code."""
    from accelerate.utils import set_seed

    from detrelay.core.engine.failure import NonFiniteStep
    from detrelay.core.engine.precision import check_precision, precision_note
    from detrelay.core.engine.stopping import TrainingInterrupted

    check_precision(accelerator)
    if accelerator.is_main_process:
        check_push(arguments)
    if note := precision_note(accelerator):
        accelerator.print(note, flush=True)
    set_threads(arguments.threads, accelerator)
    if arguments.resume:
        claim(output, recipe, arguments, accelerator, held)
    set_seed(recipe.train.seed)
    trainer = set_up(recipe, arguments, output, accelerator)
    accelerator.wait_for_everyone()  # all must have looked at the folder before one writes into it
    start_trackers(accelerator, recipe, trainer.record, output)
    if not arguments.resume:
        claim(output, recipe, arguments, accelerator, held)
    if writes_record(recipe, accelerator):
        run_folder.write_record(output, trainer.record)
    try:
        last = trainer.fit(resume=arguments.resume)
    except TrainingInterrupted as stop:
        command = f"detrelay train --resume --output {shlex.quote(str(output))}"
        accelerator.print(f"{stop}; resume with: {command}", flush=True)
        return 128 + stop.signal_number
    except NonFiniteStep as error:
        replay = f"; reproduce it with: detrelay replay --file {shlex.quote(str(error.file))}"
        print(
            f"error: {error}; the last checkpoint is kept in {output / run_folder.CHECKPOINTS}"
            f"{replay if error.file else ''}",
            file=sys.stderr,
        )
        return _NOT_FINITE
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    if accelerator.is_main_process:
        conclude(last, output)
        push(arguments, output / run_folder.BEST)
    return 0


def run_name(recipe_name: str | None, recipe: Recipe, assigner: str) -> str:
    """Name of a run's folder, from recipe, head, assigner and seed.

    The recipe is omitted if none is given, the seed if it is 0.
    """
    parts = [] if recipe_name is None else [Path(recipe_name).stem]
    parts += [recipe.head.replace(":", "."), assigner.replace(":", ".")]
    if recipe.train.seed:
        parts.append(f"seed{recipe.train.seed}")
    return "-".join(parts)


def set_keys(arguments: Arguments) -> set[str]:
    """The keys that --set names."""
    return {entry.partition("=")[0].strip() for group in arguments.set for entry in group}


def check_output(output: Path, recipe: Recipe, arguments: Arguments) -> Changes:
    """Refuse to mix two runs in one folder; returns how a resumed one changes its recipe."""
    if not arguments.resume:
        refuse_another_run(output)
        return {}
    if arguments.init is not None:
        raise RecipeError("--resume continues with the weights of the run; omit --init")
    return check_recipe(output, recipe, accept_changes=arguments.accept_changes)


def writes_record(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether this process writes into its machine's folder of the run."""
    each = recipe.train.save_on_each_node
    return bool(accelerator.is_local_main_process if each else accelerator.is_main_process)


def claim(
    output: Path,
    recipe: Recipe,
    arguments: Arguments,
    accelerator: Accelerator,
    held: ExitStack,
) -> None:
    """Lock the folder for this run until `held` exits, and check it once more.

    Raises:
        ValueError: another process holds it, or started a run in it; on every process.
    """
    from detrelay.core.engine.faults import together

    with together(accelerator):
        if writes_record(recipe, accelerator):
            held.enter_context(run_folder.locked(output))
            check_output(output, recipe, arguments)
            for model in (run_folder.BEST, run_folder.LAST):
                recover(output / model)
            recover_all(output / run_folder.CHECKPOINTS)


def check_push(arguments: Arguments) -> None:
    """Check before training whether its model can be published."""
    if arguments.push_to is not None:
        from detrelay.core.hub.publish import check_destination

        check_destination(arguments.push_to, private=arguments.push_private)
    elif arguments.push_private:
        raise ValueError("--push-private says how to publish, but no --push-to says where")


def push(arguments: Arguments, best: Path) -> None:
    """Publish the best model, if requested."""
    if arguments.push_to is None:
        return
    from detrelay.core.hub.publish import publish

    try:
        published = publish(best, arguments.push_to, private=arguments.push_private)
    except ValueError as error:
        private = " --private" if arguments.push_private else ""
        command = f"detrelay publish {shlex.quote(str(best))} {arguments.push_to}{private}"
        raise ValueError(f"{error}; the model is in {best}, publish it with: {command}") from error
    print(f"published:  {published.url} (tag {published.tag})")


def set_up(recipe: Recipe, arguments: Arguments, output: Path, accelerator: Accelerator) -> Trainer:
    """Data, model and trainer; nothing is written yet."""
    from transformers.utils import logging as transformers_logging

    from detrelay.apps.build import build_datasets, build_parts, facts_of_data, facts_of_run
    from detrelay.apps.drawing import Reporter
    from detrelay.core.engine.scaling import describe_step
    from detrelay.core.engine.trainer import Trainer

    transformers_logging.disable_progress_bar()  # one bar is enough
    accelerator.print(recipe.to_toml())
    train_samples, val_samples = build_datasets(recipe.data)
    accelerator.print(f"train: {train_samples.report.summary()}")
    accelerator.print(f"val:   {val_samples.report.summary()}")
    facts = facts_of_run(recipe, arguments.init, shlex.join(["detrelay", "train", *sys.argv[1:]]))
    facts["data"] = facts_of_data(train_samples, val_samples)
    init, fresh = arguments.init, True
    if arguments.resume:
        facts = resumed_facts(facts, output, recipe, arguments, accelerator.print)
        init = None if facts["init"] is None else Path(facts["init"])
        # a run killed before its first checkpoint starts over in the same way
        fresh = not run_folder.checkpoints(output / run_folder.CHECKPOINTS)
    parts = build_parts(recipe, train_samples, val_samples, init, fresh=fresh)
    count = sum(parameter.numel() for parameter in parts.model.parameters())
    accelerator.print(
        f"{recipe.head}: {count / 1e6:.1f} M parameters on {accelerator.device}, "
        f"{accelerator.num_processes} process(es)"
    )
    if arguments.find_batch_size:
        recipe = fitting_recipe(recipe, parts, accelerator)
        facts["recipe"] = recipe.to_mapping()
    accelerator.print(describe_step(recipe.train, accelerator.num_processes))
    return Trainer(
        accelerator,
        parts,
        recipe.train,
        num_workers=recipe.data.num_workers,
        output=output,
        record=facts,
        on_evaluation=Reporter(output, val_samples),
    )


def resumed_facts(
    facts: dict[str, Any],
    output: Path,
    recipe: Recipe,
    arguments: Arguments,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """The record of the resumed run: its start, and what has changed since."""
    stored, note = stored_record(output)
    if note is not None:
        say(note)
    if facts["data"] and not stored.get("data"):
        say("the run has no record of its data, so they cannot be compared")
    changes = check_output(output, recipe, arguments)
    changed_data = check_data(
        output, facts["data"], changes, accept_changes=arguments.accept_changes
    )
    history = list(stored.get("changes", []))
    news = [listed(changes)] if changes else []
    news += [f"{split}: {', '.join(words)}" for split, words in changed_data.items()]
    if news:
        say(f"changed since the run began: {'; '.join(news)}")
        history.append({"command": facts["command"], "recipe": changes, "data": changed_data})
    return {**facts, "init": stored.get("init"), "changes": history}


def fitting_recipe(recipe: Recipe, parts: TrainingParts, accelerator: Accelerator) -> Recipe:
    """The recipe with the largest batches that fit, and the same images per step."""
    from detrelay.apps.dry_run import largest_batch
    from detrelay.core.engine.memory import find_fitting_batch

    side = max(largest_batch(recipe))
    fit = find_fitting_batch(accelerator, parts.model, parts.criterion, recipe.train, side)
    accelerator.print(
        f"fits into memory: train.batch_size={fit.batch_size} "
        f"train.accumulation_steps={fit.accumulation_steps}"
    )
    return replace(
        recipe,
        train=replace(
            recipe.train,
            batch_size=fit.batch_size,
            accumulation_steps=fit.accumulation_steps,
        ),
    )


def conclude(last: Evaluation, output: Path) -> None:
    """The closing figures, on the screen and in a file."""
    best = run_folder.measured(output / run_folder.BEST)
    results = {"epoch": last.epoch, "step": last.step, **last.scores.to_dict(), "best": best}
    write_text(output / run_folder.RESULTS, json.dumps(results, indent=1) + "\n")
    picture = output / run_folder.PICTURES / f"epoch_{last.epoch}.png"
    print(f"\nafter epoch {last.epoch} (percent)\n{last.scores.table()}\n")
    print(f"results:    {output / run_folder.RESULTS}")
    print(f"curves:     {output / run_folder.CURVES}")
    print(f"picture:    {picture}")
    if best is None:
        print(
            f"best model: none; {output / run_folder.BEST} was removed or damaged during the "
            f"training, the final weights are in {output / run_folder.LAST}"
        )
        return
    name, value = next(iter(best["stats"].items()))
    figures = f"(epoch {best['epoch']}, {name} {value:.4f})"
    print(f"best model: {output / run_folder.BEST} {figures}")


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: train(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
