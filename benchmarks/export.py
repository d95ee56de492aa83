"""Time of detectors of published size in PyTorch and exported, in one process and in turn.

python benchmarks/export.py --head stageinteractor --folder exported --sides 640x640 800x1344
python benchmarks/export.py --head dino --folder exported --batches 1 --threads 2 --profile

The weights are random, the ResNet-50 and the head as published. Files are written into the folder
once; a second run reads them. One line for each size, batch and number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.export.comparison import median_seconds
from detrelay.core.export.runtimes import FORMATS, open_file
from detrelay.core.export.writing import trace, write_file, write_onnx
from detrelay.heads import HEADS

_TIMED = {"onnxruntime": "onnx", "OpenVINO": "openvino"}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    height: int
    width: int
    batch: int
    threads: int


def main() -> None:
    """Write what is missing, then print the table, and with --profile what takes the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", choices=sorted(HEADS), default="stageinteractor")
    parser.add_argument("--queries", type=int, help="as published if not named")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", default=["640x640", "800x1344"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no line after these")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only-write", action="store_true")
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    entry = HEADS[arguments.head]
    queries = {} if arguments.queries is None else {"num_queries": arguments.queries}
    model = entry.model(entry.config(**queries)).eval()
    folder = arguments.folder / arguments.head
    if not (folder / "model.xml").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_onnx(trace(model), folder / "model.onnx")
        write_file(folder / "model.onnx", "openvino", folder)
    if arguments.only_write:
        return
    cases = [
        Case(*(int(side) for side in sides.split("x")), batch, threads)
        for batch in arguments.batches
        for threads in arguments.threads
        for sides in arguments.sides
    ]
    print("| head | height x width | batch | threads | PyTorch ms | " + " | ".join(_TIMED) + " |")
    print("|---" * (5 + len(_TIMED)) + "|")
    for case in cases:
        if time.perf_counter() - start > arguments.seconds:
            print(f"not timed, out of time: {case}")
            continue
        took = times(model, folder, case, arguments.rounds)
        ratios = [f"{value * 1e3:.0f} ({took[0] / value:.2f})" for value in took[1:]]
        print(
            f"| {arguments.head} | {case.height} x {case.width} | {case.batch} | {case.threads} | "
            f"{took[0] * 1e3:.0f} | {' | '.join(ratios)} |",
            flush=True,
        )
    if arguments.profile:
        profile(folder, cases[0])
    print(f"load {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds after one not measured")


def times(
    model: DetectorForObjectDetection, folder: Path, case: Case, rounds: int
) -> Sequence[float]:
    """Medians in seconds: PyTorch, then as in `_TIMED`."""
    pixels, mask = inputs(case)
    torch.set_num_threads(case.threads)

    def eager() -> None:
        with torch.no_grad():
            model(torch.from_numpy(pixels), torch.from_numpy(mask))

    calls: list[Callable[[], Any]] = [eager]
    for kind in _TIMED.values():
        run = open_file(kind, folder / FORMATS[kind].file, case.threads)
        calls.append(lambda run=run: run(pixels, mask))  # type: ignore[misc]
    return median_seconds(calls, rounds)


def inputs(case: Case) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Noise without padding."""
    shape = (case.batch, 3, case.height, case.width)
    pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return pixels, np.ones((case.batch, case.height, case.width), dtype=np.int64)


def profile(folder: Path, case: Case) -> None:
    """Shares of the time by kind of operation, of one call after one not measured."""
    import onnxruntime
    import openvino

    pixels, mask = inputs(case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    for _ in range(2):
        session.run(None, {"pixel_values": pixels, "pixel_mask": mask})
    file = Path(session.end_profiling())
    spent: Counter[str] = Counter()
    for event in json.loads(file.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and "op_name" in event.get("args", {}):
            spent[event["args"]["op_name"]] += event["dur"] / 2
    file.unlink()
    show("onnxruntime", spent)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": case.threads,
        "PERF_COUNT": True,
    }
    compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", settings)
    request = compiled.create_infer_request()
    for _ in range(2):
        request.infer([pixels, mask])
    spent = Counter()
    for entry in request.profiling_info:
        spent[entry.node_type] += entry.real_time.total_seconds() * 1e6
    show("OpenVINO", spent)


def show(name: str, spent: Counter[str]) -> None:
    """The ten kinds that take longest."""
    total = sum(spent.values())
    kinds = ", ".join(f"{kind} {100 * took / total:.0f} %" for kind, took in spent.most_common(10))
    print(f"{name}: {total / 1e3:.0f} ms in operations: {kinds}", flush=True)


if __name__ == "__main__":
    main()
