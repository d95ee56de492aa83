"""Detect objects in images, draw them, and write them down.

detrelay predict --model runs/stageinteractor-cross_stage/best --input photos --output out
"""

from __future__ import annotations

import glob
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from detrelay.apps.console import Debug, read_arguments, run

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.model import DetectorForObjectDetection

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_SOME_IMAGES_FAILED = 1


@dataclass(frozen=True)
class Arguments:
    """Draw what a saved model finds; also writes predictions.json."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    input: str
    """An image, a folder of images, or a glob pattern in quotes."""
    output: Path
    """Folder for the drawn images and predictions.json."""
    threshold: float = 0.5
    """Least score of a detection, 0 to 1."""
    head: str | None = None
    """The model's head as module:ConfigClass, if it is none of this project's."""
    debug: Debug = False


def predict(arguments: Arguments) -> int:
    """Go through the images; the exit code."""
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, found {arguments.threshold}")
    paths = find_images(arguments.input)
    targets = drawn_names(paths, arguments.output)

    import torch

    from detrelay.apps.build import load_saved

    model, processor = load_saved(arguments.model, arguments.head)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(model, device).eval()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    broken = 0
    for number, (path, target) in enumerate(zip(paths, targets, strict=True), start=1):
        try:
            image = open_image(path)
        except (OSError, ValueError, SyntaxError) as error:
            broken += 1
            print(f"skipped {path}: cannot be decoded ({error})", file=sys.stderr)
            continue
        found = detect_one(model, processor, image, arguments.threshold)
        draw(model, image, found, target)
        rows += to_rows(model, found, number, path)
        print(f"{path}: {len(found['scores'])} objects -> {target}")
    (arguments.output / "predictions.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} objects in {len(paths) - broken} images, {broken} images skipped")
    return _SOME_IMAGES_FAILED if broken else 0


def find_images(pattern: str) -> list[Path]:
    """The files that a path, a folder or a pattern stands for, sorted."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    candidates = path.iterdir() if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    found = sorted(item for item in candidates if item.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(f"--input {pattern}: no image there (looked for {' '.join(_SUFFIXES)})")
    return found


def drawn_names(paths: list[Path], output: Path) -> list[Path]:
    """Where each drawn image goes; never onto another one or onto an input."""
    targets = [output / f"{path.name}.png" for path in paths]
    if len(set(targets)) < len(targets):
        raise ValueError("--input: two images have the same file name; go folder by folder")
    return targets


def open_image(path: Path) -> Image.Image:
    """A decoded RGB image, turned upright as its EXIF tag says."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def detect_one(
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    image: Image.Image,
    threshold: float,
) -> dict[str, Tensor]:
    """Scores, class indices and boxes xyxy in pixels of one image, on the CPU."""
    import torch

    inputs = processor(images=image, return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model(**inputs)
    size = [(image.height, image.width)]
    result = processor.post_process_object_detection(outputs, threshold, size)[0]
    return {key: value.cpu() for key, value in result.items()}


def draw(
    model: DetectorForObjectDetection, image: Image.Image, found: dict[str, Tensor], target: Path
) -> None:
    """Write the image with its boxes."""
    from torchvision.transforms.v2 import functional as tv_functional

    from detrelay.apps.drawing import draw_boxes

    classes = found["labels"].tolist()
    names = [model.config.class_names[index] for index in classes]
    captions = [f"{n} {s:.2f}" for n, s in zip(names, found["scores"].tolist(), strict=True)]
    drawn = draw_boxes(tv_functional.pil_to_tensor(image), found["boxes"], classes, captions)
    tv_functional.to_pil_image(drawn).save(target)


def to_rows(
    model: DetectorForObjectDetection, found: dict[str, Tensor], number: int, path: Path
) -> list[dict[str, Any]]:
    """COCO results of one image, with its file name and each category's name."""
    from detrelay.core.evaluation.coco_ap import detections_from_results

    category_ids = model.config.category_ids or list(range(len(model.config.class_names)))
    rows = detections_from_results([found], [number], category_ids)
    return [
        {**row, "file_name": path.name, "category": model.config.class_names[index]}
        for row, index in zip(rows, found["labels"].tolist(), strict=True)
    ]


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: predict(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
