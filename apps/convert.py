"""Turn a checkpoint of a released program into a model folder.

python apps/convert.py --checkpoint dino_r50_4scale.pth --output dino
python apps/convert.py --head stageinteractor --variant r50_300 --checkpoint latest.pth --output out
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from console import run

if TYPE_CHECKING:
    from detrelay.core.image_processing import DetrelayImageProcessor
    from detrelay.heads.convert import Conversion

# of the batch's height and width; the programs of the DETR family pad to the largest image alone
_PADDED_TO = {"stageinteractor": 32, "adamixer": 32}


@dataclass(frozen=True)
class Arguments:
    """Convert a released checkpoint of StageInteractor, AdaMixer, Deformable DETR or DINO."""

    checkpoint: Path
    """File of the released program, or a Deformable DETR folder of transformers."""
    output: Path
    """Folder to write, for from_pretrained."""
    head: str | None = None
    """stageinteractor, adamixer, deformable_detr or dino; told by the names if left out."""
    variant: str | None = None
    """Published model that the checkpoint must be, such as r50_1x; told by the shapes if left
    out."""


def convert(arguments: Arguments) -> int:
    """Write the folder and account for every entry; the exit code."""
    output = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: already there; name a new folder")
    from detrelay.heads.convert import convert_checkpoint

    conversion = convert_checkpoint(arguments.checkpoint, arguments.head, arguments.variant)
    for theirs, ours in conversion.used:
        print(f"used     {theirs} -> {ours}")
    for theirs, reason in conversion.dropped.items():
        print(f"dropped  {theirs}: {reason}")
    for ours, reason in conversion.added.items():
        print(f"added    {ours}: {reason}")
    write(conversion, image_processor(arguments.checkpoint, conversion.head), output)
    print(
        f"{output}: {conversion.head} {conversion.variant or '(sizes of no published variant)'}, "
        f"{len({theirs for theirs, _ in conversion.used})} entries used, "
        f"{len(conversion.dropped)} dropped, {len(conversion.added)} added"
    )
    return 0


def image_processor(checkpoint: Path, head: str) -> DetrelayImageProcessor:
    """The published test size and padding, or the size and statistics that a folder states."""
    from detrelay.core.image_processing import DetrelayImageProcessor
    from detrelay.heads.transformers_checkpoint import read_image_settings

    settings = read_image_settings(checkpoint) if checkpoint.is_dir() else {}
    return DetrelayImageProcessor(pad_size_divisor=_PADDED_TO.get(head, 1), **settings)


def write(conversion: Conversion, processor: DetrelayImageProcessor, output: Path) -> None:
    """Write model and processor; the folder gets its name when it is whole."""
    import torch

    with torch.device("meta"):
        model = conversion.model(conversion.config)
    model.load_state_dict(conversion.state, assign=True)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        if output.exists():  # empty
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    run(lambda: convert(tyro.cli(Arguments)))
