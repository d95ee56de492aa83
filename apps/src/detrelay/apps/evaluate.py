"""COCO figures of a saved model, or of detections that are already on disk.

detrelay evaluate --model runs/stageinteractor-cross_stage/best --data val.json
detrelay evaluate --predictions detections.json --data val.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import tyro

from detrelay.apps.console import (
    Debug,
    is_first_process,
    read_arguments,
    require_positive,
    run,
)
from detrelay.core.data.formats import MAX_PIXELS

if TYPE_CHECKING:
    from accelerate import Accelerator

    from detrelay.apps.build import AnyDataset
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.model import DetectorForObjectDetection
    from detrelay.core.evaluation.federated import Federation
    from detrelay.core.evaluation.tables import Detections

BackendName = Literal["pycocotools", "hotcoco"]
BATCH_SIZE = 4
_MAX_DETECTIONS = 100
_DIGITS = 6


@dataclass(frozen=True)
class Arguments:
    """Evaluate a saved model, or score a COCO results list."""

    data: Path
    """Annotated data: a COCO json, or a place in any known format, of which split `val` is used."""
    model: Path | None = None
    """Folder of a saved model, or its name on the Hub."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    predictions: Path | None = None
    """COCO results list to score instead of a model."""
    images: Path | None = None
    """Folder of the images; looked for near the json if not given."""
    output: Path | None = None
    """File to write the figures to, as json."""
    details: Path | None = None
    """Folder for charts and json: figures by class and size, confusion, calibration, errors."""
    detections: Path | None = None
    """File to write the detections to, as a COCO results list with the dataset's ids."""
    batch_size: int = BATCH_SIZE
    """Images per batch; affects only the speed."""
    max_detections: int | None = None
    """Maximum boxes per image; 100, or 300 for data annotated as in LVIS."""
    class_agnostic: tyro.conf.FlagCreatePairsOff[bool] = False
    """Ignore classes: only score whether objects are found."""
    backend: BackendName = "pycocotools"
    """Back end; hotcoco gives the same figures faster (pip install 'detrelay[fast]')."""
    max_pixels: int = MAX_PIXELS
    """Maximum number of pixels of an image; a larger one is rejected."""
    allow_outside: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also read images whose file_name in --data points outside the image folder."""
    debug: Debug = False


def evaluate(arguments: Arguments) -> int:
    """Print the figures, write the requested files; returns the exit code."""
    if (arguments.model is None) == (arguments.predictions is None):
        raise ValueError("name either --model or --predictions")
    require_positive(arguments, "max_detections", "batch_size")
    if arguments.predictions is not None:
        if arguments.detections is not None:
            raise ValueError("--detections writes what a model finds; it needs --model")
        if not is_first_process():
            return 0
        content, detections = read_lists(arguments.data, arguments.predictions)
    else:
        content, found = detect_all(arguments)
        if found is None:  # another process of this run has them
            return 0
        detections = found
        if arguments.detections is not None:
            detections.write(arguments.detections)
            print(f"{len(detections)} detections -> {arguments.detections}")
        if not content["annotations"]:
            print(f"{arguments.data} has no annotations: nothing is scored")
            return 0
    score(arguments, content, detections, asked_federation(arguments))
    return 0


def asked_federation(arguments: Arguments) -> Federation | None:
    """Which categories were checked in which images, if the data are annotated as in LVIS."""
    from detrelay.core.evaluation.federated import read_federation

    if not (arguments.data.is_file() and arguments.data.suffix == ".json"):
        return None
    federation = read_federation(arguments.data)
    if federation is not None and arguments.class_agnostic:
        raise ValueError(
            f"{arguments.data}: annotated as in LVIS, so figures without categories are not "
            f"defined; leave out --class-agnostic"
        )
    return federation


def most_detections(arguments: Arguments, federation: Federation | None) -> int:
    """Maximum boxes per image."""
    from detrelay.core.evaluation import federated

    if arguments.max_detections is not None:
        return arguments.max_detections
    return _MAX_DETECTIONS if federation is None else federated.MAX_DETECTIONS


def score(
    arguments: Arguments,
    content: Mapping[str, Any],
    detections: Detections,
    federation: Federation | None,
) -> None:
    """Print the figures of detections, and write the requested files."""
    from detrelay.core.evaluation.backends import accumulate
    from detrelay.core.evaluation.coco_ap import CocoResult, limits_of, summarize
    from detrelay.core.evaluation.federated import evaluate_federated, prepared
    from detrelay.core.evaluation.tables import GroundTruth

    truth = GroundTruth.from_coco(content)
    found = truth.place(detections)
    if arguments.class_agnostic:
        truth, found = truth.class_agnostic(), found.class_agnostic()
    limit = most_detections(arguments, federation)
    scores: CocoResult
    if federation is None:
        accumulated = accumulate(truth, found, limits_of(limit), arguments.backend)
        scores = summarize(accumulated, truth.names, limit)
    else:
        truth, found = prepared(truth, found, federation, limit)
        scores, accumulated = evaluate_federated(
            truth, found, federation, max_detections=limit, backend=arguments.backend
        )
        print("annotated as in LVIS: figures as LVIS defines them\n")
    if arguments.output is not None:
        write_json(arguments.output, scores.to_dict())
    print(scores.table())
    if arguments.details is not None:
        from detrelay.apps.charts import draw_analysis
        from detrelay.core.evaluation.analysis import analyse

        analysis = analyse(truth, found, accumulated)
        write_json(arguments.details / "figures.json", scores.to_dict())
        write_json(arguments.details / "analysis.json", analysis.to_dict())
        (arguments.details / "table.txt").write_text(analysis.table() + "\n", encoding="utf-8")
        draw_analysis(analysis, arguments.details)
        print(f"\n{analysis.table()}\n\ncharts and figures -> {arguments.details}")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write numbers to six decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(content), indent=1) + "\n", encoding="utf-8")


def read_lists(data: Path, predictions: Path) -> tuple[dict[str, Any], Detections]:
    """Ground truth and detections from two files; images are not needed."""
    from detrelay.core.data.readers import coco
    from detrelay.core.evaluation.tables import ids_of_files, read_detections

    truth = coco.read(data, with_files=False).to_coco()
    return truth, read_detections(predictions, ids_of_files(truth))


def detect_all(arguments: Arguments) -> tuple[dict[str, Any], Detections | None]:
    """Ground truth of a dataset and the model's detections; None on all but the main process."""
    import numpy as np
    from accelerate import Accelerator

    from detrelay.apps.build import load_saved

    assert arguments.model is not None
    samples = images_of(arguments)
    model, processor = load_saved(arguments.model, arguments.head)
    if not samples.ground_truth["annotations"] and arguments.detections is None:
        raise ValueError(
            f"{arguments.data}: has no annotations, so nothing can be scored; --detections FILE "
            f"writes what the model finds"
        )
    category_ids = known_categories(model, samples, data=arguments.data, source=arguments.model)
    accelerator = Accelerator()
    accelerator.print(samples.report.summary())
    detections = detect_in(
        accelerator,
        model,
        processor,
        samples,
        category_ids,
        most_detections(arguments, asked_federation(arguments)),
        arguments.batch_size,
    )
    if not accelerator.is_main_process:
        return samples.ground_truth, None
    present = np.array([category.id for category in samples.categories], dtype=np.int64)
    return samples.ground_truth, detections.select(np.isin(detections.category_ids, present))


def images_of(arguments: Arguments) -> AnnotatedImages:
    """The images to evaluate on; a COCO file may have no annotations."""
    from detrelay.core.data.coco import AnnotatedImages, CocoDataset
    from detrelay.core.data.places import evaluation_split

    data, images = arguments.data, arguments.images
    limit, outside = arguments.max_pixels, arguments.allow_outside
    if data.is_file() and data.suffix == ".json":
        return CocoDataset(data, images, annotated=False, max_pixels=limit, allow_outside=outside)
    found = evaluation_split(str(data), images, allow_outside=outside)
    return AnnotatedImages(found, max_pixels=limit)


def detect_in(
    accelerator: Accelerator,
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    samples: AnyDataset,
    category_ids: Sequence[int],
    max_detections: int,
    batch_size: int = BATCH_SIZE,
) -> Detections:
    """A model's detections on a dataset; to be called by every process.

    Args:
        accelerator: distributes the images.
        model: not yet prepared.
        processor: the model's.
        samples: the images.
        category_ids: original category id by class index.
        max_detections: boxes per image, best scores first.
        batch_size: images per batch; affects only the speed.
    """
    from detrelay.apps.build import eval_data
    from detrelay.core.engine.inference import detect
    from detrelay.core.engine.loaders import make_eval_loader
    from detrelay.core.evaluation.tables import Detections

    loader = make_eval_loader(
        eval_data(samples, processor),
        batch_size,
        processor.pad_size_divisor,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    prepared = accelerator.prepare(model)
    image_ids, results = detect(accelerator, prepared, loader, processor, max_detections)
    return Detections.from_results(results, image_ids, category_ids)


def known_categories(
    model: DetectorForObjectDetection, samples: AnyDataset, *, data: Path, source: Path
) -> list[int]:
    """Original category ids by class index, if the model has learned the data's categories.

    It may know more: released models have a class for every id of COCO, used or not.
    """
    ids = model.config.category_ids or [category.id for category in samples.categories]
    learned = dict(zip(ids, model.config.class_names, strict=False))
    present = {category.id: category.name for category in samples.categories}
    if not present.items() <= learned.items() or len(ids) != model.config.num_labels:
        raise ValueError(
            f"{data}: its categories {present} are not among those that {source} has learned, "
            f"{learned}"
        )
    return list(ids)


def rounded(values: Any) -> Any:
    """The same nested values with floats to six decimals."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value) for value in values]
    return round(values, _DIGITS) if isinstance(values, float) else values


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: evaluate(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
