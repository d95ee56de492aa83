"""Measure how long a fresh process takes from its start to the boxes of one image.

python benchmarks/first_boxes.py runs/stageinteractor-cross_stage/best
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from detrelay.apps.console import run

# Run in a separate process. Wall-clock time, since the start is measured in another process.
_PROCESS = """
import json, platform, sys, time
started, source, path = float(sys.argv[1]), sys.argv[2], sys.argv[3]
marks = [time.time()]
import torch
import detrelay.heads
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from detrelay.core.errors import one_line
marks.append(time.time())
try:
    model = AutoModelForObjectDetection.from_pretrained(source)
    processor = AutoImageProcessor.from_pretrained(source)
except (OSError, ValueError) as error:
    sys.exit(one_line(error))
marks.append(time.time())
image = (Image.open(path) if path else Image.effect_noise((640, 480), 80)).convert("RGB")
for _ in range(2):
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    processor.post_process_object_detection(outputs, 0.5, [(image.height, image.width)])
    marks.append(time.time())
parts = [after - before for before, after in zip([started, *marks], marks)]
print(json.dumps({
    "seconds to first boxes": marks[3] - started,
    "of these, start of Python": parts[0],
    "of these, imports": parts[1],
    "of these, loading": parts[2],
    "of these, first image": parts[3],
    "seconds for the next image": parts[4],
    "image": f"{image.width} x {image.height} pixels",
    "device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads",
}))
"""


@dataclass(frozen=True)
class Arguments:
    """Time to first boxes: start of Python, imports, loading, one image; medians."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Folder of a saved model, or its name on the Hub."""
    image: Path | None = None
    """Image to detect in; 640 x 480 pixels of noise if not given."""
    repeats: int = 3
    """Fresh processes; the first one may also read from a cold disk."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the figures as json: as speed.json of a model folder they go into its card."""


def measure(arguments: Arguments) -> int:
    """Print the medians, write them if requested; returns the exit code."""
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, found {arguments.repeats}")
    runs = [run_process(arguments) for _ in range(arguments.repeats)]
    figures = {
        name: round(statistics.median(run[name] for run in runs), 2)
        if isinstance(value, float)
        else value
        for name, value in runs[0].items()
    }
    for name, value in figures.items():
        print(f"{name:<28}{value}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def run_process(arguments: Arguments) -> dict[str, Any]:
    """The figures of one fresh process."""
    image = "" if arguments.image is None else str(arguments.image)
    command = [sys.executable, "-c", _PROCESS, str(time.time()), arguments.model, image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ValueError(f"{arguments.model}: {reason[0]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    run(lambda: measure(tyro.cli(Arguments)))
