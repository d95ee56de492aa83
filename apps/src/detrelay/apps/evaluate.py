"""COCO figures of a saved model, or of detections that are already on disk.

detrelay evaluate --model runs/stageinteractor-cross_stage/best --data val.json
detrelay evaluate --predictions detections.json --data val.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tyro

from detrelay.apps.console import Debug, run

if TYPE_CHECKING:
    from detrelay.core.data.coco import CocoDataset
    from detrelay.core.detector.model import DetectorForObjectDetection

_BATCH_SIZE = 4
_DIGITS = 6


@dataclass(frozen=True)
class Arguments:
    """Evaluate a saved model, or score a COCO results list."""

    data: Path
    """COCO json with the truth."""
    model: Path | None = None
    """Folder of a saved model, or its name on the Hub."""
    head: str | None = None
    """The model's head as module:ConfigClass, if it is none of this project's."""
    predictions: Path | None = None
    """COCO results list to score instead of a model's."""
    images: Path | None = None
    """Folder of the images; the json's own surroundings if not named."""
    output: Path | None = None
    """Where to write the figures as json."""
    max_detections: int = 100
    """Boxes per image that count."""
    debug: Debug = False


def evaluate(arguments: Arguments) -> int:
    """Print the figures, write them where asked to; the exit code."""
    if (arguments.model is None) == (arguments.predictions is None):
        raise ValueError("name either --model or --predictions")
    from detrelay.core.evaluation.coco_ap import evaluate_coco

    rows: list[dict[str, Any]] | None
    if arguments.predictions is not None:
        ground_truth, rows = read_lists(arguments.data, arguments.predictions)
    else:
        ground_truth, rows = detect_all(arguments)
    if rows is None:  # another process of this run has them
        return 0
    scores = evaluate_coco(ground_truth, rows, max_detections=arguments.max_detections)
    figures = rounded(scores.to_dict())
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for title, values in (("", figures["stats"]), ("AP by category", figures["AP_per_category"])):
        print(title)
        width = max(map(len, values))
        for name, value in values.items():
            print(f"{name:<{width}}  {value:9.6f}")
    return 0


def read_lists(data: Path, predictions: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and detections as they stand in two files; images are not needed."""
    from detrelay.core.data.coco import read_annotations

    truth = read_annotations(data, with_files=False)
    rows = read_json(predictions)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{predictions}: not a COCO results list; expected a list of objects with image_id, "
            f"category_id, bbox and score"
        )
    return truth, rows


def read_json(path: Path) -> Any:
    """The content of a json file, or one clear error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not json ({error})") from error


def detect_all(arguments: Arguments) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Truth of a data set and what the model finds in it; None on all but the main process."""
    from accelerate import Accelerator

    from detrelay.apps.build import eval_data, load_saved
    from detrelay.core.data.coco import CocoDataset
    from detrelay.core.data.transforms import VisitSampler
    from detrelay.core.engine.inference import detect
    from detrelay.core.engine.loaders import make_loader
    from detrelay.core.evaluation.coco_ap import detections_from_results

    assert arguments.model is not None
    samples = CocoDataset(arguments.data, arguments.images)
    model, processor = load_saved(arguments.model, arguments.head)
    category_ids = known_categories(model, samples, arguments)
    accelerator = Accelerator()
    sampler = VisitSampler(len(samples), seed=0, shuffle=False)
    loader = make_loader(eval_data(samples, processor), sampler, _BATCH_SIZE)
    model, loader = accelerator.prepare(model, loader)
    accelerator.print(samples.report.summary())
    image_ids, results = detect(accelerator, model, loader, processor, arguments.max_detections)
    if not accelerator.is_main_process:
        return samples.ground_truth, None
    rows = detections_from_results(results, image_ids, category_ids)
    present = {category.id for category in samples.categories}
    return samples.ground_truth, [row for row in rows if row["category_id"] in present]


def known_categories(
    model: DetectorForObjectDetection, samples: CocoDataset, arguments: Arguments
) -> list[int]:
    """Original category ids by class index, if the model has learned those of the data.

    It may know more: released models have a class for each id of COCO, used or not.
    """
    ids = model.config.category_ids or [category.id for category in samples.categories]
    learned = dict(zip(ids, model.config.class_names, strict=False))
    present = {category.id: category.name for category in samples.categories}
    if not present.items() <= learned.items() or len(ids) != model.config.num_labels:
        raise ValueError(
            f"{arguments.data}: its categories {present} are not among those that "
            f"{arguments.model} has learned, {learned}"
        )
    return list(ids)


def rounded(values: Any) -> Any:
    """The same nested values with floats to six decimals."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, _DIGITS) if isinstance(values, float) else values


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: evaluate(tyro.cli(Arguments)))


if __name__ == "__main__":
    main()
