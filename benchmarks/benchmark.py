"""Measure the detectors.

On the CPU: how close the StageInteractor decoder and DINO come to the rate of a large matrix
product, what a pass of each costs in time and memory, and how Deformable DETR compares with that of
transformers, with the same weights. Compared runs alternate in one process.

With `--what training`, on the accelerator if there is one: images per second and peak memory of
whole training steps, from image files to new weights, and where the time goes.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from detrelay.apps.console import run

if TYPE_CHECKING:
    from benchmark_cases import Action

_MATMUL_SIZE = 2048
_TRAINING_RECIPES = ("stageinteractor_r50_1x", "dino_r50_4scale_12e")
_HEADER = f"{'':34}{'s':>8}{'GFLOP':>8}{'GFLOP/s':>9}{'of matmul':>10}{'peak MiB':>10}"


@dataclass
class Arguments:
    """Time detectors relative to this machine's matrix product, and to transformers."""

    what: tuple[
        Literal["stageinteractor", "deformable_detr", "dino", "detectors", "training"], ...
    ] = (
        "stageinteractor",
        "deformable_detr",
        "dino",
    )
    """What to measure: for StageInteractor only the decoder, the others from image to boxes;
    detectors: StageInteractor (the first number of queries) and DINO from image to boxes, with the
    backbone module by module and with convolutions, norms and ReLUs in one call; training: steps of
    StageInteractor and DINO with ResNet-50."""
    queries: tuple[int, ...] = (100, 300)
    """Numbers of queries of the StageInteractor decoder."""
    height: int = 800
    """Height of the image, pixels."""
    width: int = 1344
    """Width of the image, pixels."""
    threads: int = 1
    """CPU threads."""
    batch_size: int = 2
    """Images per training step."""
    compiled: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also measure training with torch.compile."""
    repeats: int = 5
    """Timed runs per row, reported as median; for training, steps, reported as mean."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the rows as json."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was run.
        seconds: median time.
        gflop: floating-point operations in matrix products and convolutions, in units of 1e9.
        matmul: its rate over that of a large float32 matrix product between the runs, median.
        peak_mib: largest resident size of a process that does it once, 2^20 bytes.
        of_other: its time over that of the previous row, median over adjacent runs.
    """

    name: str
    seconds: float
    gflop: float
    matmul: float
    peak_mib: float
    of_other: float | None = None

    def __str__(self) -> str:
        rate = self.gflop / self.seconds
        text = f"{self.name:34}{self.seconds:8.2f}{self.gflop:8.1f}{rate:9.1f}{self.matmul:10.2f}"
        text += f"{self.peak_mib:10.0f}"
        return text if self.of_other is None else f"{text}   {self.of_other:.2f} of the row above"


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(cases: dict[str, Callable[[], Action]], arguments: Arguments) -> list[Row]:
    """Time actions in turns, with a matrix product between any two."""
    import torch

    actions = {name: build() for name, build in cases.items()}
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    right = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    work = {name: operations_of(action) for name, action in actions.items()}
    times: dict[str, list[float]] = {name: [] for name in actions}
    products = [seconds_of(lambda: left @ right)]
    for _ in range(arguments.repeats):
        for name, action in actions.items():
            times[name].append(seconds_of(action))
            products.append(seconds_of(lambda: left @ right))
    beside = [(before + after) / 2 for before, after in itertools.pairwise(products)]
    rows: list[Row] = []
    for index, (name, seconds) in enumerate(times.items()):
        own = beside[index :: len(times)]
        product = 2 * _MATMUL_SIZE**3
        rates = [
            (work[name] / took) / (product / base) for took, base in zip(seconds, own, strict=True)
        ]
        others = times[rows[-1].name] if rows else None
        rows.append(
            Row(
                name=name,
                seconds=statistics.median(seconds),
                gflop=work[name] / 1e9,
                matmul=statistics.median(rates),
                peak_mib=peak_memory(cases[name], arguments.threads),
                of_other=others and statistics.median(map(float.__truediv__, seconds, others)),
            )
        )
    return rows


def operations_of(action: Action) -> int:
    """Floating-point operations of one call, which also warms it up."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch warns about GPUs of other vendors
        # the counter does not support oneDNN's fused convolutions: count those of the modules
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
            action()
    return counter.get_total_flops()


def peak_memory(build: Callable[[], Action], threads: int) -> float:
    """Largest resident size of a fresh process that does the action once, MiB."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory_here, build, threads).result()


def _peak_memory_here(build: Callable[[], Action], threads: int) -> float:
    import torch

    from detrelay.core.engine.memory import peak_memory_mib

    torch.set_num_threads(threads)
    build()()
    return peak_memory_mib(torch.device("cpu"))


def tables(arguments: Arguments) -> dict[str, dict[str, Callable[[], Action]]]:
    """What to compare, by title."""
    import benchmark_cases as cases

    size = (arguments.height, arguments.width)
    found: dict[str, dict[str, Callable[[], Action]]] = {}
    if "stageinteractor" in arguments.what:
        for queries in arguments.queries:
            decoder = partial(cases.stageinteractor_decoder, *size, queries)
            found[f"StageInteractor decoder, {queries} queries"] = {
                "float32": partial(decoder, False),
                "bf16 autocast": partial(decoder, True),
            }
    if "deformable_detr" in arguments.what:
        for train, title in ((False, "forward"), (True, "losses and gradients")):
            found[f"Deformable DETR, {title}"] = {
                "transformers": partial(cases.deformable_detr_of_transformers, *size, train),
                "detrelay": partial(cases.deformable_detr, *size, train),
            }
    if "dino" in arguments.what:
        found["DINO, 4-scale"] = {
            "forward": partial(cases.dino, *size, False),
            "losses and gradients": partial(cases.dino, *size, True),
        }
    if "detectors" in arguments.what:
        for name, options in (
            ("stageinteractor", {"num_queries": arguments.queries[0]}),
            ("dino", {}),
        ):
            whole = partial(cases.whole_detector, name, *size, options)
            found[f"{name}, from image to boxes"] = {
                "backbone module by module": partial(whole, False),
                "in one call each": partial(whole, True),
            }
    return found


def training_tables(arguments: Arguments) -> dict[str, list[dict[str, Any]]]:
    """Measure and print training steps, row by row."""
    from accelerate import Accelerator

    from benchmark_training import HEADER, TrainingCase, measure_training

    device = Accelerator().device
    results: dict[str, list[dict[str, Any]]] = {}
    for recipe in _TRAINING_RECIPES:
        print(f"\nTraining by the recipe {recipe}, on {device}\n{HEADER}")
        results[recipe] = []
        for compiled in (False, True)[: 1 + arguments.compiled]:
            for precision in ("no", "bf16"):
                case = TrainingCase(
                    recipe=recipe,
                    precision=precision,
                    compiled=compiled,
                    batch_size=arguments.batch_size,
                    height=arguments.height,
                    width=arguments.width,
                    steps=arguments.repeats,
                    threads=arguments.threads,
                )
                row = measure_training(case)
                print(row, flush=True)
                results[recipe].append(asdict(row))
    return results


def main(arguments: Arguments) -> int:
    """Print a table for each comparison."""
    import torch

    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.height}x{arguments.width}, {arguments.threads} CPU thread(s), "
        f"torch {torch.__version__}"
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for title, cases in tables(arguments).items():
        rows = measure(cases, arguments)
        results[title] = [asdict(row) for row in rows]
        print(f"\n{title}\n{_HEADER}")
        print("\n".join(map(str, rows)), flush=True)
    if "training" in arguments.what:
        results |= training_tables(arguments)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Arguments)))
