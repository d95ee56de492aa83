"""Time of a small detector in PyTorch and exported, on one thread, in one process and in turn.

python benchmarks/export.py --head stageinteractor --format onnx
python benchmarks/export.py --head dino --format openvino --sides 320 640
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from detrelay.core.export.comparison import compare, measure
from detrelay.core.export.runtimes import FORMATS, find_format, open_file
from detrelay.core.export.writing import trace, write
from detrelay.heads import HEADS

_BACKBONE = {"backbone_name": "resnet18", "backbone_norm": "train", "backbone_frozen_stages": 0}


def main() -> None:
    """Print one line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", choices=sorted(HEADS), default="stageinteractor")
    parser.add_argument("--format", choices=sorted(FORMATS), default="onnx")
    parser.add_argument("--sides", type=int, nargs="+", default=[320, 640])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    entry = HEADS[arguments.head]
    model = entry.model(entry.config(**_BACKBONE, num_queries=arguments.queries)).eval()
    with tempfile.TemporaryDirectory() as folder:
        write(trace(model), arguments.format, Path(folder))
        file = Path(folder) / find_format(arguments.format).file
        run = open_file(arguments.format, file, threads=1)
        print("| side | PyTorch ms | exported ms | times as fast | logits | boxes | load |")
        print("|---|---|---|---|---|---|---|")
        for side in arguments.sides:
            found = compare(model, run, [(side, side)])
            times = measure(model, run, (side, side), arguments.rounds)
            print(
                f"| {side} | {times.model_seconds * 1e3:.0f} | {times.file_seconds * 1e3:.0f} | "
                f"{times.model_seconds / times.file_seconds:.2f} | "
                f"{max(d.logits for d in found):.1e} | {max(d.boxes for d in found):.1e} | "
                f"{'-' if times.load is None else f'{times.load:.1f}'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
