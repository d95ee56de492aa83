"""Compare runs that exist: means and intervals over seeds and images, paired with a baseline.

detrelay compare runs/base-seed0 runs/base-seed1 runs/new-seed0 runs/new-seed1 --output comparison
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run
from detrelay.core.engine import run_folder

if TYPE_CHECKING:
    from detrelay.apps.comparison import Row, RunScores
    from detrelay.core.evaluation.tables import Detections, GroundTruth
    from detrelay.core.recipes.recipe import Recipe

_SEED = re.compile(r"[-_]?seed[-_]?\d+$")
_DRAWS = 400
_LIMIT = 100

Backend = Literal["pycocotools", "hotcoco"]


@dataclass(frozen=True)
class Arguments:
    """Write comparison.md, comparison.tex, comparison.json and curves.png."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS ...")]
    """Folders of finished runs; those whose recipes differ only by the seed are one setting."""
    output: Path
    """Folder for the comparison."""
    baseline: str | None = None
    """Name of the setting to compare the others with; that of the first run if not given."""
    backend: Backend = "pycocotools"
    """Back end for AP; hotcoco gives the same figures faster (pip install 'detrelay[fast]')."""
    debug: Debug = False


@dataclass(frozen=True)
class FinishedRun:
    """A run folder whose training is done.

    Attributes:
        folder: where it is.
        recipe: what was trained.
        minutes: training time; None if not measured.
    """

    folder: Path
    recipe: Recipe
    minutes: float | None = None


def compare_runs(arguments: Arguments) -> int:
    """Read the runs, write the comparison; returns the exit code."""
    if not arguments.runs:
        raise ValueError("name the folders of the runs to compare")
    settings = group([read_run(folder) for folder in arguments.runs])
    baseline = arguments.baseline or next(iter(settings))
    write_comparison(settings, baseline, {}, arguments.output, arguments.backend)
    return 0


def read_run(folder: Path, minutes: float | None = None) -> FinishedRun:
    """A finished run.

    Raises:
        ValueError: the folder contains no run, or an unfinished one.
    """
    from detrelay.apps.resume import stored_recipe

    recipe = stored_recipe(folder)
    if not (folder / run_folder.RESULTS).is_file():
        raise ValueError(
            f"{folder}: the run is not finished (it has no {run_folder.RESULTS}), and a mean "
            f"without it would mislead; continue it with detrelay train --resume --output {folder}"
        )
    return FinishedRun(folder, recipe, minutes)


def group(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs by setting, in the order they were named.

    Raises:
        ValueError: a setting has two runs with the same seed, or two settings would have the same
            name.
    """
    settings: dict[str, list[FinishedRun]] = {}
    names: dict[str, str] = {}
    for entry in runs:
        values = entry.recipe.to_mapping()
        seed = values["train"].pop("seed", None)
        name = names.setdefault(json.dumps(values, sort_keys=True), _name(entry.folder))
        known = settings.setdefault(name, [])
        for other in known:
            apart = other.recipe.to_mapping()
            same_seed = apart["train"].pop("seed", None) == seed
            if apart != values:
                raise ValueError(
                    f"{other.folder} and {entry.folder}: would both be called {name}, but their "
                    f"recipes differ; rename one of the folders"
                )
            if same_seed:
                raise ValueError(
                    f"{other.folder} and {entry.folder}: two runs of {name} with the same seed"
                )
        known.append(entry)
    return settings


def _name(folder: Path) -> str:
    short = _SEED.sub("", folder.resolve().name)
    return short or folder.resolve().parent.name


def write_comparison(
    settings: Mapping[str, Sequence[FinishedRun]],
    baseline: str,
    missing: Mapping[str, str],
    output: Path,
    backend: Backend,
) -> list[Row]:
    """Score all runs on the same resampled images, write tables and curves; returns the rows."""
    from detrelay.apps.comparison import compare, latex, markdown
    from detrelay.apps.evaluate import write_json

    scored: dict[str, list[RunScores]] = {}
    truth: GroundTruth | None = None
    for name, runs in settings.items():
        scored[name] = []
        for entry in runs:
            own, detections = detections_of(entry)
            if truth is None:
                truth = own
            elif not _same(truth, own):
                raise ValueError(
                    f"{entry.folder}: was not evaluated on the same images as the first run"
                )
            scored[name].append(score(entry, truth, detections, backend))
    rows = compare(scored, baseline, missing)
    output.mkdir(parents=True, exist_ok=True)
    table = markdown(rows, _LIMIT)
    (output / "comparison.md").write_text(table + "\n", encoding="utf-8")
    (output / "comparison.tex").write_text(latex(rows, _LIMIT) + "\n", encoding="utf-8")
    write_json(output / "comparison.json", {"settings": [asdict(row) for row in rows]})
    draw_runs(settings, output / "curves.png")
    print(table)
    print(f"\ntables and curves -> {output}")
    return rows


def _same(first: GroundTruth, second: GroundTruth) -> bool:
    import numpy as np

    return first.names == second.names and all(
        np.array_equal(getattr(first, column), getattr(second, column))
        for column in ("image_ids", "category_ids", "image", "category", "boxes_xywh", "crowd")
    )


def detections_of(entry: FinishedRun) -> tuple[GroundTruth, Detections]:
    """Ground truth and detections of a run's final model, cached in its folder.

    The final model and not the best one, which was chosen on the very images it is scored on.
    """
    from accelerate import Accelerator

    from detrelay.apps.build import build_datasets, load_saved
    from detrelay.apps.evaluate import detect_in, known_categories
    from detrelay.core.evaluation.tables import GroundTruth, read_detections

    samples = build_datasets(entry.recipe.data)[1]
    truth = GroundTruth.from_coco(samples.ground_truth)
    file = entry.folder / "detections.json"
    if file.is_file():
        return truth, read_detections(file)
    print(f"{entry.folder}: detecting in {len(samples)} images", flush=True)
    model, processor = load_saved(entry.folder / run_folder.LAST)
    category_ids = known_categories(
        model, samples, data=entry.folder, source=entry.folder / run_folder.LAST
    )
    detections = detect_in(Accelerator(), model, processor, samples, category_ids, _LIMIT)
    partial = file.with_name(file.name + ".partial")
    detections.write(partial)
    partial.replace(file)
    return truth, detections


def score(
    entry: FinishedRun, truth: GroundTruth, detections: Detections, backend: Backend
) -> RunScores:
    """AP of a run on all images and on resampled ones."""
    from detrelay.apps.comparison import RunScores
    from detrelay.core.evaluation.coco_ap import evaluate_coco
    from detrelay.core.evaluation.matching import match
    from detrelay.core.evaluation.resampling import image_weights, resampled_ap

    stats = evaluate_coco(truth, detections, max_detections=_LIMIT, backend=backend).stats
    matches = match(truth, truth.place(detections), _LIMIT)
    return RunScores(
        seed=entry.recipe.train.seed,
        ap=stats["AP"],
        ap50=stats["AP50"],
        resampled=resampled_ap(matches, image_weights(len(truth.image_ids), _DRAWS)),
        minutes=entry.minutes,
    )


def draw_runs(settings: Mapping[str, Sequence[FinishedRun]], target: Path) -> None:
    """AP over the steps of all runs, one colour per setting."""
    from matplotlib import pyplot as plt

    from detrelay.apps.charts import save
    from detrelay.core.engine.logging import read_metrics

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for number, (name, runs) in enumerate(settings.items()):
        for count, entry in enumerate(runs):
            lines = [
                line
                for line in read_metrics(entry.folder / run_folder.METRICS)
                if line["kind"] == "evaluation"
            ]
            axis.plot(
                [line["step"] for line in lines],
                [100 * line["AP"] for line in lines],
                color=f"C{number}",
                alpha=0.7,
                label=name if count == 0 else None,
            )
    axis.set(xlabel="step", ylabel="AP, percent")
    axis.grid(alpha=0.3)
    if settings:
        axis.legend(fontsize=8)
    save(figure, target)


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: compare_runs(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
