"""Convert a released checkpoint to a model folder.

detrelay convert --checkpoint dino_r50_4scale.pth --output dino
detrelay convert --head stageinteractor --variant r50_300 --checkpoint latest.pth --output out
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from detrelay.apps.console import Debug, read_arguments, run
from detrelay.apps.train import RECIPES
from detrelay.core.recipes.recipe import load_recipe

if TYPE_CHECKING:
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.config import DetectorConfig
    from detrelay.heads.convert.conversion import Conversion

# of the batch's height and width; the released code of the DETR family pads only to the largest
# image
_PADDED_TO = {"stageinteractor": 32, "adamixer": 32}


@dataclass(frozen=True)
class Arguments:
    """Convert a released checkpoint of StageInteractor, AdaMixer, Deformable DETR or DINO."""

    checkpoint: Path
    """Checkpoint of the released code, or a Deformable DETR folder of transformers."""
    output: Path
    """Folder to write, loadable by from_pretrained."""
    head: str | None = None
    """stageinteractor, adamixer, deformable_detr or dino; inferred from the names if omitted."""
    variant: str | None = None
    """Published model that the checkpoint must be, such as r50_1x; inferred from the shapes if
    omitted."""
    weights: Literal["average", "plain"] | None = None
    """Weights to take from a file that also has their running average; default: the average."""
    debug: Debug = False


def convert(arguments: Arguments) -> int:
    """Write the folder and account for every entry; returns the exit code."""
    output = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: already exists; name a new folder")
    from detrelay.heads.convert.conversion import convert_checkpoint

    conversion = convert_checkpoint(
        arguments.checkpoint, arguments.head, arguments.variant, arguments.weights
    )
    if (weights := conversion.weights) is not None and weights.other is not None:
        kinds = {"average": "their running average", "plain": "the weights themselves"}
        other = "plain" if weights.which == "average" else "average"
        print(
            f"weights  {weights.place}: {kinds[weights.which]}; "
            f"--weights {other} takes {weights.other}"
        )
    for theirs, ours in conversion.used:
        print(f"used     {theirs} -> {ours}")
    for theirs, reason in conversion.dropped.items():
        print(f"dropped  {theirs}: {reason}")
    for ours, reason in conversion.added.items():
        print(f"added    {ours}: {reason}")
    write(conversion, arguments.checkpoint, output)
    print(
        f"{output}: {conversion.head} {conversion.variant or '(sizes of no published variant)'}, "
        f"{len({theirs for theirs, _ in conversion.used})} entries used, "
        f"{len(conversion.dropped)} dropped, {len(conversion.added)} added"
    )
    return 0


def image_processor(checkpoint: Path, head: str) -> DetrelayImageProcessor:
    """Image processor with the published test size and padding, or a folder's own settings."""
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.heads.convert.transformers_folder import read_image_settings

    settings: dict[str, Any] = {"pad_size_divisor": _PADDED_TO.get(head, 1)}
    if checkpoint.is_dir():
        settings |= read_image_settings(checkpoint)
    return DetrelayImageProcessor(**settings)


def write(conversion: Conversion, checkpoint: Path, output: Path) -> None:
    """Write model, processor and facts about them, all or nothing."""
    import torch

    from detrelay.core.engine.checkpoint import save_model

    with torch.device("meta"):
        model = conversion.model(conversion.config)
    model.load_state_dict(conversion.state, assign=True)
    processor = image_processor(checkpoint, conversion.head)
    save_model(model, processor, facts_of_conversion(conversion, checkpoint), output)


def facts_of_conversion(conversion: Conversion, checkpoint: Path) -> dict[str, Any]:
    """Facts about the model for `training.json`, without paths of this machine."""
    from detrelay.apps.build import facts_of_program
    from detrelay.core.engine.checkpoint import sha256_of
    from detrelay.heads.convert.transformers_folder import WEIGHTS

    checkpoint = checkpoint.resolve()
    file = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
    converted = {
        "checkpoint": file.relative_to(checkpoint.parent).as_posix(),
        "sha256": sha256_of(file),
        "program": conversion.program,
        "variant": conversion.variant,
        "published": published_figures(conversion.head, conversion.config),
    }
    if (weights := conversion.weights) is not None and weights.other is not None:
        converted["weights"] = weights.place
    return {"converted": converted, **facts_of_program()}


def published_figures(head: str, config: DetectorConfig) -> dict[str, str]:
    """Published figures of models with exactly these settings, by name of the recipe.

    A checkpoint does not say how it was trained, so there may be several; there are none for
    classes other than COCO's.
    """
    if config.category_ids is None:
        return {}
    classes = {name: getattr(config, name) for name in ("id2label", "label2id", "category_ids")}
    found = {}
    for file in sorted(RECIPES.glob("*.toml")):
        text = re.sub(r"\n#\s*", " ", file.read_text(encoding="utf-8"))
        if (figures := re.search(r"Published, not measured here: (.+?\))", text)) is None:
            continue
        recipe = load_recipe(file)
        if recipe.head != head:
            continue
        if type(config)(**classes, **recipe.model).to_dict() == config.to_dict():
            found[file.stem] = figures[1]
    return found


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: convert(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
