"""Measure decoders on this machine: time, arithmetic rate, and the share of the matmul rate."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from console import run

_STRIDES = (4, 8, 16, 32)
_MATMUL_SIZE = 2048


@dataclass
class Arguments:
    """Time the StageInteractor decoder beside this machine's own large matrix product."""

    queries: tuple[int, ...] = (100, 300)
    """Numbers of queries to measure."""
    height: int = 800
    """Height of the image whose features are decoded, pixels."""
    width: int = 1344
    """Width of that image, pixels."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 9
    """Timed runs of each row; the median is reported."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the rows as json, too."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was run.
        queries: number of queries.
        seconds: median time of a forward pass.
        gflop: floating-point operations of a pass, in units of 1e9.
        gflops: rate, 1e9 operations a second.
        matmul_gflops: rate of a large float32 matrix product, runs alternating with the passes.
        ratio: the decoder's rate over the matrix product's, median over alternating pairs.
    """

    name: str
    queries: int
    seconds: float
    gflop: float
    gflops: float
    matmul_gflops: float
    ratio: float


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(arguments: Arguments, queries: int, *, bfloat16: bool) -> Row:
    """Time one decoder; each pass stands between two matrix products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from detrelay.heads.stageinteractor import StageInteractorConfig, StageInteractorHead

    torch.manual_seed(0)
    head = StageInteractorHead(StageInteractorConfig(num_queries=queries)).eval()
    pyramid = make_pyramid(arguments.height, arguments.width)
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    right = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    precision = torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()
    with torch.no_grad():
        # the counter does not know oneDNN's linear: count the same products through BLAS
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
            head(pyramid)
        operations = counter.get_total_flops()
        with precision:
            head(pyramid)
            passes, products = [], [seconds_of(lambda: left @ right)]
        for _ in range(arguments.repeats):
            with precision:
                passes.append(seconds_of(lambda: head(pyramid)))
            products.append(seconds_of(lambda: left @ right))
    work = 2 * _MATMUL_SIZE**3
    rates = [operations / seconds for seconds in passes]
    beside = [work * 2 / (before + after) for before, after in itertools.pairwise(products)]
    return Row(
        name="bf16 autocast" if bfloat16 else "float32",
        queries=queries,
        seconds=statistics.median(passes),
        gflop=operations / 1e9,
        gflops=statistics.median(rates) / 1e9,
        matmul_gflops=statistics.median(beside) / 1e9,
        ratio=statistics.median(a / b for a, b in zip(rates, beside, strict=True)),
    )


def make_pyramid(height: int, width: int):  # type: ignore[no-untyped-def]
    """Random features of one image, laid out channels-last as the neck hands them over."""
    import torch

    from detrelay.core.structures import FeaturePyramid

    shapes = [(height // stride, width // stride) for stride in _STRIDES]
    return FeaturePyramid(
        levels=tuple(
            torch.randn(1, 256, *shape).contiguous(memory_format=torch.channels_last)
            for shape in shapes
        ),
        strides=_STRIDES,
        valid=tuple(torch.ones(1, *shape, dtype=torch.bool) for shape in shapes),
        image_sizes=torch.tensor([[height, width]]),
    )


def main(arguments: Arguments) -> int:
    """Print a row for each number of queries and precision."""
    import torch

    torch.set_num_threads(arguments.threads)
    print(f"StageInteractor decoder, {arguments.height}x{arguments.width}, {torch.__version__}")
    print(f"{'':14}{'queries':>8}{'ms':>9}{'GFLOP':>8}{'GFLOP/s':>9}{'matmul':>8}{'ratio':>7}")
    rows = []
    for queries in arguments.queries:
        for bfloat16 in (False, True):
            row = measure(arguments, queries, bfloat16=bfloat16)
            rows.append(asdict(row))
            print(
                f"{row.name:14}{row.queries:8d}{row.seconds * 1e3:9.0f}{row.gflop:8.1f}"
                f"{row.gflops:9.1f}{row.matmul_gflops:8.1f}{row.ratio:7.2f}",
                flush=True,
            )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Arguments)))
