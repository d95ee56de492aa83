"""Detect objects in images, draw them, and write them down.

detrelay predict --model runs/stageinteractor-cross_stage/best --input photos --output out
detrelay predict --model runs/stageinteractor-cross_stage/best --data val.json --output out
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import tyro

from detrelay.apps.console import Debug, is_out_of_memory, read_arguments, run
from detrelay.apps.inputs import Input, find_inputs, listed_inputs
from detrelay.core.data.formats import MAX_PIXELS

if TYPE_CHECKING:
    from torch import Tensor

    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.model import DetectorForObjectDetection

_SOME_IMAGES_FAILED = 1


@dataclass(frozen=True)
class Arguments:
    """Draw what a saved model finds; also writes predictions.json."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    output: Path
    """Folder for the drawn images and predictions.json."""
    input: str | None = None
    """An image, a folder of images, or a glob pattern in quotes."""
    data: Path | None = None
    """COCO json, or another data set, whose images to process; results bear its image ids."""
    images: Path | None = None
    """Folder of the images of --data; the json's own surroundings if not named."""
    threshold: float = 0.5
    """Minimum score of a detection, 0 to 1."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image; larger ones are not decoded."""
    allow_outside: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also read images whose file_name in --data leads out of the image folder."""
    debug: Debug = False


def predict(arguments: Arguments) -> int:
    """Process the images; the exit code."""
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, found {arguments.threshold}")
    if arguments.max_pixels < 1:
        raise ValueError(f"--max-pixels must be at least 1, found {arguments.max_pixels}")
    inputs = _inputs(arguments)

    import torch

    from detrelay.apps.build import load_saved

    model, processor = load_saved(arguments.model, arguments.head)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device).eval()
    failed = objects = 0
    with _results(arguments.output) as results:
        for item in inputs:
            try:
                found = go_through(model, processor, item, arguments)
            except (ValueError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                _refuse_damaged_weights(model, arguments.model)
                failed += 1
                _skip(item, error)
                continue
            rows = to_rows(model, found, item)
            results.write(json.dumps(rows) + "\n")
            results.flush()
            objects += len(rows)
            print(f"{item.file_name}: {len(rows)} objects -> {item.target}")
    print(f"{objects} objects in {len(inputs) - failed} images, {failed} images skipped")
    return _SOME_IMAGES_FAILED if failed else 0


def _inputs(arguments: Arguments) -> list[Input]:
    """The images that were asked for."""
    if (arguments.input is None) == (arguments.data is None):
        raise ValueError("name either --input or --data")
    if arguments.data is not None:
        return listed_inputs(
            arguments.data,
            arguments.images,
            arguments.output,
            allow_outside=arguments.allow_outside,
        )
    assert arguments.input is not None
    for option, value in (
        ("--images", arguments.images),
        ("--allow-outside", arguments.allow_outside),
    ):
        if value:
            raise ValueError(f"{option} is about the file names in --data; --input needs none")
    inputs, left_out = find_inputs(arguments.input, arguments.output)
    if left_out:
        print(f"left out: {left_out}", file=sys.stderr)
    return inputs


@contextmanager
def _results(output: Path) -> Iterator[IO[str]]:
    """A file for one line of rows per image, which becomes `predictions.json` at the end.

    What was found before the process was killed stays in `predictions.partial.jsonl`.
    """
    from detrelay.core.engine.atomic_folder import written_aside

    output.mkdir(parents=True, exist_ok=True)
    target, partial = output / "predictions.json", output / "predictions.partial.jsonl"
    with partial.open("w", encoding="utf-8") as lines:
        yield lines
    with (
        written_aside(target) as aside,
        aside.open("w", encoding="utf-8") as whole,
        partial.open(encoding="utf-8") as lines,
    ):
        separator = "[\n"
        for line in lines:
            for row in json.loads(line):
                whole.write(separator + json.dumps(row))
                separator = ",\n"
        whole.write("[]\n" if separator == "[\n" else "\n]\n")
    partial.unlink()


def _skip(item: Input, error: Exception) -> None:
    from detrelay.core.errors import one_line

    print(f"skipped {item.file_name}: {one_line(error)}", file=sys.stderr)


def _refuse_damaged_weights(model: DetectorForObjectDetection, folder: Path) -> None:
    """End everything where no image can come out well."""
    damaged = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if damaged:
        raise ValueError(
            f"{folder}: {len(damaged)} of its weights hold NaN or infinite values, such as "
            f"{damaged[0]}; no image can be processed with them"
        )


def go_through(
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    item: Input,
    arguments: Arguments,
) -> dict[str, Tensor]:
    """Read an image, detect, and draw what was found.

    Raises:
        ImageError: the image cannot be read.
        NonFiniteOutput: the model's scores or boxes are NaN or infinite.
    """
    from detrelay.core.data.decode import read_image

    pixels = read_image(
        item.source, size=item.size, max_pixels=arguments.max_pixels, name=item.file_name
    )
    found = detect_one(model, processor, pixels, arguments.threshold)
    draw(model, pixels, found, item.target)
    return found


def detect_one(
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    pixels: Tensor,
    threshold: float,
) -> dict[str, Tensor]:
    """Scores, class indices and boxes xyxy in pixels of one image [3, H, W], on the CPU."""
    import torch

    inputs = processor(images=pixels, return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model(**inputs)
    size = [(pixels.shape[-2], pixels.shape[-1])]
    result = processor.post_process_object_detection(outputs, threshold, size)[0]
    return {key: value.cpu() for key, value in result.items()}


def draw(
    model: DetectorForObjectDetection, pixels: Tensor, found: dict[str, Tensor], target: Path
) -> None:
    """Write the image [3, H, W] with its boxes."""
    from torchvision.transforms.v2 import functional as tv_functional

    from detrelay.apps.drawing import draw_boxes

    classes = found["labels"].tolist()
    names = [model.config.class_names[index] for index in classes]
    captions = [f"{n} {s:.2f}" for n, s in zip(names, found["scores"].tolist(), strict=True)]
    drawn = draw_boxes(pixels, found["boxes"], classes, captions)
    aside = target.with_name(f".{target.name}.partial")
    tv_functional.to_pil_image(drawn).save(aside, "PNG")
    aside.replace(target)


def to_rows(
    model: DetectorForObjectDetection, found: dict[str, Tensor], item: Input
) -> list[dict[str, Any]]:
    """COCO results of one image, with its file name and each category's name.

    `image_id` is there only if an annotation file gives one: a made-up id would be taken for that
    of another image.
    """
    from detrelay.core.evaluation.coco_ap import detections_from_results

    category_ids = model.config.category_ids or list(range(len(model.config.class_names)))
    known = {} if item.image_id is None else {"image_id": item.image_id}
    rows = detections_from_results([found], [item.image_id or 0], category_ids)
    return [
        {
            **known,
            "file_name": item.file_name,
            **{key: row[key] for key in ("category_id", "bbox", "score")},
            "category": model.config.class_names[index],
        }
        for row, index in zip(rows, found["labels"].tolist(), strict=True)
    ]


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: predict(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
