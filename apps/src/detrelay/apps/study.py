"""Train a grid of settings and seeds, and compare the settings.

detrelay study table6_shapes --output studies/table6_shapes
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from detrelay.apps.compare import Backend, FinishedRun, read_run, write_comparison
from detrelay.apps.console import Debug, read_arguments, require_positive, run
from detrelay.core.engine import run_folder
from detrelay.core.engine.atomic_folder import write_text
from detrelay.core.errors import nearest, unknown_name

if TYPE_CHECKING:
    from detrelay.apps.train import Arguments as TrainArguments

STUDIES = Path(__file__).parent / "studies"
_MINUTES = "minutes.json"
_UNFINISHED = 1
_POLL_SECONDS = 0.2


class StudyError(ValueError):
    """A study file is malformed; the message names the file and the key."""


@dataclass(frozen=True)
class Arguments:
    """Train every setting with every seed, in folders OUTPUT/SETTING/seed-N, and compare."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """TOML file, or name of a file in the package."""
    output: Path
    """Folder of the study; finished runs are kept, others resume or start."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER|TRAIN.json VAL.json")] = ()
    """The data of every run, as in train."""
    recipe: str | None = None
    """TOML file or name of a recipe for every run, instead of those of the study."""
    seeds: tuple[int, ...] = ()
    """Seeds of every setting, instead of the study's."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        tyro.conf.arg(metavar="KEY=VALUE ..."),
    ] = ()
    """Recipe values of every run; the study's settings take precedence."""
    parallel: int = 1
    """Number of concurrent runs."""
    launch: str | None = None
    """Launcher of a run, such as "accelerate launch --num_processes 8"; default: plain Python."""
    backend: Backend = "pycocotools"
    """Back end for AP; hotcoco gives the same figures faster (pip install 'detrelay[fast]')."""
    debug: Debug = False


@dataclass(frozen=True)
class Setting:
    """The common settings of the runs in one row; None means the study's.

    Attributes:
        recipe: TOML file or name of a recipe.
        head: decoder head.
        assigner: training targets.
        set: recipe values.
    """

    recipe: str | None = None
    head: str | None = None
    assigner: str | None = None
    set: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """A grid of settings and seeds.

    Attributes:
        about: its question, in a sentence.
        seeds: of every setting.
        baseline: the setting to compare others with.
        settings: by name.
    """

    about: str
    seeds: tuple[int, ...]
    baseline: str
    settings: dict[str, Setting]


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    setting: str
    seed: int
    arguments: TrainArguments

    @property
    def name(self) -> str:
        """Its name in folders and on the screen."""
        return f"{self.setting}/seed-{self.seed}"


def study(arguments: Arguments) -> int:
    """Train what is not finished, compare; returns the exit code."""
    require_positive(arguments, "parallel")
    plan = plan_of(arguments)
    jobs = make_jobs(plan, arguments)
    check(jobs)
    arguments.output.mkdir(parents=True, exist_ok=True)
    to_run = [job for job in jobs if not is_finished(job)]
    print(f"{plan.about}\n{len(jobs)} runs, {len(jobs) - len(to_run)} of them finished", flush=True)
    Runner(arguments).run(to_run)
    minutes = read_minutes(arguments.output)
    finished: dict[str, list[FinishedRun]] = {name: [] for name in plan.settings}
    missing: dict[str, list[str]] = {}
    for job in jobs:
        if is_finished(job):
            folder = output_of(job)
            finished[job.setting].append(read_run(folder, minutes.get(job.name)))
        else:
            missing.setdefault(job.setting, []).append(str(job.seed))
    gaps = {name: f"no mean: seed {', '.join(seeds)} missing" for name, seeds in missing.items()}
    write_comparison(finished, plan.baseline, gaps, arguments.output, arguments.backend)
    for name, gap in gaps.items():
        print(f"{name}: {gap}", file=sys.stderr)
    return _UNFINISHED if gaps else 0


def plan_of(arguments: Arguments) -> Study:
    """The study with the seeds and the recipe of the command line."""
    plan = read_study(study_file(arguments.study))
    if arguments.seeds:
        if len(set(arguments.seeds)) < len(arguments.seeds):
            raise ValueError(f"--seeds must differ, found {list(arguments.seeds)}")
        plan = replace(plan, seeds=arguments.seeds)
    if arguments.recipe is None:
        return plan
    settings = {
        name: replace(setting, recipe=arguments.recipe) for name, setting in plan.settings.items()
    }
    return replace(plan, settings=settings)


def study_file(name: str) -> Path:
    """The file of a study, by path or name."""
    if name.endswith(".toml"):
        return Path(name)
    known = sorted(path.stem for path in STUDIES.glob("*.toml"))
    if name not in known:
        raise StudyError(unknown_name("study", name, known))
    return STUDIES / f"{name}.toml"


def read_study(path: Path) -> Study:
    """Read a study from its file.

    Raises:
        StudyError: the file cannot be read, or a key is unknown, missing or of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise StudyError(f"{path}: not TOML ({error})") from error
    shared_keys = [field.name for field in fields(Setting)]
    known = ["about", "seeds", "baseline", "settings", *shared_keys]
    _check_keys(path, "", content, known)
    for key, kind, expected in (
        ("about", str, "a sentence"),
        ("seeds", list, "a list of whole numbers"),
        ("baseline", str, "the name of a setting"),
        ("settings", dict, "a table of tables"),
    ):
        if not isinstance(content.get(key), kind):
            raise StudyError(f"{path}: {key} must be {expected}, found {content.get(key)!r}")
    seeds = content["seeds"]
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: seeds must be different whole numbers, found {seeds}")
    shared = _setting(path, "", {key: content[key] for key in shared_keys if key in content})
    settings = {}
    for name, values in content["settings"].items():
        if not isinstance(values, dict):
            raise StudyError(f"{path}: settings.{name} must be a table, found {values!r}")
        if Path(name).name != name:
            raise StudyError(f"{path}: settings.{name}: the name becomes that of a folder")
        _check_keys(path, f"settings.{name}.", values, shared_keys)
        own = _setting(path, f"settings.{name}.", values)
        named = {key: getattr(own, key) for key in values if key != "set"}
        settings[name] = replace(shared, **named, set=shared.set + own.set)
    if content["baseline"] not in settings:
        raise StudyError(
            f"{path}: baseline {content['baseline']!r} is not a setting; "
            f"{nearest(content['baseline'], settings)}"
        )
    return Study(content["about"], tuple(seeds), content["baseline"], settings)


def _check_keys(path: Path, place: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise StudyError(f"{path}: unknown key {place}{key}; {nearest(key, known)}")


def _setting(path: Path, place: str, values: Mapping[str, Any]) -> Setting:
    for key, value in values.items():
        if key == "set":
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise StudyError(
                    f'{path}: {place}set must be a list such as ["train.epochs=2"], found {value!r}'
                )
        elif not isinstance(value, str):
            raise StudyError(f"{path}: {place}{key} must be text, found {value!r}")
    return Setting(**{**values, "set": tuple(values.get("set", ()))})


def make_jobs(plan: Study, arguments: Arguments) -> list[Job]:
    """Every setting with every seed."""
    from detrelay.apps.train import Arguments as TrainArguments

    return [
        Job(
            name,
            seed,
            TrainArguments(
                recipe=setting.recipe,
                head=setting.head,
                assigner=setting.assigner,
                data=arguments.data,
                output=arguments.output / name / f"seed-{seed}",
                seed=seed,
                set=(*arguments.set, setting.set) if setting.set else arguments.set,
            ),
        )
        for seed in plan.seeds  # one seed for every setting before the next seed
        for name, setting in plan.settings.items()
    ]


def check(jobs: Sequence[Job]) -> None:
    """Reject invalid recipes, and runs trained with other recipes, before any training.

    Raises:
        ValueError: names the setting and the problem.
    """
    from detrelay.apps.resume import stored_recipe
    from detrelay.apps.train import resolve
    from detrelay.apps.training_targets import build_criterion, head_entry, model_config
    from detrelay.core.recipes.recipe import differences

    for job in jobs:
        try:
            resolved = resolve(job.arguments)
            model_config(resolved, head_entry(resolved.head))
            build_criterion(resolved)
        except ValueError as error:
            raise StudyError(f"setting {job.setting}: {error}") from error
        folder = output_of(job)
        if is_finished(job) and (changed := differences(stored_recipe(folder), resolved)):
            listed = ", ".join(f"{key} ({old!r} -> {new!r})" for key, (old, new) in changed.items())
            raise StudyError(
                f"{folder}: was trained with another recipe: {listed}; name another --output"
            )


def output_of(job: Job) -> Path:
    """The folder of a run."""
    assert job.arguments.output is not None
    return job.arguments.output


def is_finished(job: Job) -> bool:
    """Whether a run is done."""
    return (output_of(job) / run_folder.RESULTS).is_file()


def command(job: Job, launch: str | None) -> list[str]:
    """The command line of a run; it resumes if there is something to resume."""
    resolved, folder = job.arguments, output_of(job)
    program = shlex.split(launch) if launch else [sys.executable]
    words = [*program, "-m", "detrelay.apps.train", "--output", str(folder)]
    for key in ("recipe", "head", "assigner", "seed"):
        if (value := getattr(resolved, key)) is not None:
            words += [f"--{key}", str(value)]
    if resolved.data:
        words += ["--data", *map(str, resolved.data)]
    for part in resolved.set:
        words += ["--set", *part]
    return [*words, "--resume"] if run_folder.remains_of_a_run(folder) else words


def start(words: Sequence[str], log: IO[str]) -> subprocess.Popen[bytes]:
    """Start a run that writes into a log."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


class Runner:
    """Starts runs, several at once, and records their minutes.

    The output of a run goes into a log next to its folder. If the study is stopped, its runs are
    stopped too, and resume the next time.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job]) -> None:
        """Train all of them; a failed run is reported and skipped."""
        with ThreadPoolExecutor(self.arguments.parallel) as pool:
            tasks = [pool.submit(self._train, job) for job in jobs]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                self._stop.set()
                for task in tasks:
                    task.cancel()
                raise

    def _train(self, job: Job) -> None:
        folder = output_of(job)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        words = command(job, self.arguments.launch)
        print(f"{job.name}: {'resumes' if words[-1] == '--resume' else 'starts'}", flush=True)
        began = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            process = start(words, file)
            while process.poll() is None:
                if self._stop.wait(_POLL_SECONDS):
                    process.terminate()
                    process.wait()
        self._count(job, (time.monotonic() - began) / 60)
        outcome = (
            "done" if is_finished(job) else f"failed (exit code {process.returncode}), see {log}"
        )
        print(f"{job.name}: {outcome}", flush=True)

    def _count(self, job: Job, minutes: float) -> None:
        with self._lock:
            known = read_minutes(self.arguments.output)
            known[job.name] = known.get(job.name, 0.0) + minutes
            write_text(self.arguments.output / _MINUTES, json.dumps(known, indent=1) + "\n")


def read_minutes(output: Path) -> dict[str, float]:
    """Minutes of each run so far, summed over all its starts."""
    file = output / _MINUTES
    if not file.is_file():
        return {}
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    return found


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: study(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
