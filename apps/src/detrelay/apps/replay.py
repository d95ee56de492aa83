"""Repeat a training step that met a non-finite value.

    detrelay replay --file runs/NAME/failures/step_0000123/process_0.safetensors

The weights, batches and random numbers of the step are in the folder of the file, its recipe in
training.json two folders above.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run

_NOT_FINITE = 1


@dataclass(frozen=True)
class Arguments:
    """Repeat a failed training step; exits with code 1 if it fails again."""

    file: Annotated[Path, tyro.conf.arg(metavar="PROCESS_N.safetensors")]
    """The batches of one process, as training saved them."""
    debug: Debug = False


def replay(arguments: Arguments) -> int:
    """Load the batches and repeat the step; returns the exit code."""
    folder = arguments.file.parent
    for file in (arguments.file, folder / "config.json"):
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; expected the batches that training saved of a failed step"
            )

    from transformers import AutoModelForObjectDetection

    from detrelay.apps.build import build_criterion
    from detrelay.apps.launch import make_accelerator
    from detrelay.apps.resume import stored_recipe
    from detrelay.core.engine.failure import replay_failure

    recipe = stored_recipe(folder.parent.parent)
    model = AutoModelForObjectDetection.from_pretrained(
        folder, trust_remote_code=False, use_safetensors=True
    )
    facts = json.loads(arguments.file.with_suffix(".json").read_text(encoding="utf-8"))
    print(f"step {facts['step']}, image ids {facts['image_ids']}; then: {facts['problem']}")
    accelerator = make_accelerator(recipe)
    criterion = build_criterion(recipe)
    criterion.progress.share = facts.get("progress", 0.0)
    try:
        replay_failure(accelerator, arguments.file, model, criterion)
    except FloatingPointError as error:
        print(f"now: {error}")
        return _NOT_FINITE
    print("now: every loss and gradient is finite")
    return 0


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: replay(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
