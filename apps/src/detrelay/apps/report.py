"""One page of charts about the stages of a saved detector.

detrelay report --model runs/stageinteractor-cross_stage/best --data val.json --output report
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from detrelay.apps.console import Debug, read_arguments, require_positive, run

if TYPE_CHECKING:
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.evaluation.recording import Recording
    from detrelay.core.evaluation.tables import Found, GroundTruth
    from detrelay.core.losses import LossConfig
    from detrelay.heads.stageinteractor.gates import FilterGate


@dataclass(frozen=True)
class Arguments:
    """Write report.html, figures.json and the charts as PNG files."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    data: Path
    """Folder or file of annotated images in any known format; of splits, val is used."""
    output: Path
    """Folder for the report."""
    beside: Path | None = None
    """A second model to draw next to the first, such as one without filter reuse."""
    images: Path | None = None
    """Folder of the images; looked for near the annotations if not given."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    assigner: str = "cross_stage"
    """Assigner whose labels are compared with each stage's own matching."""
    num_images: int | None = None
    """Use only the first images."""
    gallery: int = 4
    """Number of hardest images to show."""
    max_detections: int = 100
    """Maximum boxes per image."""
    batch_size: int = 4
    """Images per batch."""
    backend: Literal["pycocotools", "hotcoco"] | None = None
    """Back end for AP, equal in its figures; hotcoco, which is faster, if it is installed."""
    debug: Debug = False


def report(arguments: Arguments) -> int:
    """Run the model, analyse its stages, write the page; returns the exit code."""
    require_positive(arguments, "max_detections", "batch_size", "num_images")
    if arguments.gallery < 0:
        raise ValueError(f"--gallery must be at least 0, found {arguments.gallery}")

    from detrelay.apps.report_page import models
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.places import evaluation_split

    samples = AnnotatedImages(evaluation_split(str(arguments.data), arguments.images))
    truth = shown_truth(samples, number_of_images(samples, arguments))
    figures, found = figures_of(arguments.model, samples, truth, arguments)
    figures["beside"] = None
    if arguments.beside is not None:
        figures["beside"] = figures_of(arguments.beside, samples, truth, arguments)[0]
    page = write_report(figures, samples, truth, found, arguments.output)
    limit = min(100, arguments.max_detections)
    for prefix, model in models(figures):
        by_stage = "  ".join(f"{100 * stage['stats']['AP']:.1f}" for stage in model["stages"])
        print(f"{prefix}AP by stage (maxDets {limit}): {by_stage}")
    print(f"report -> {page}")
    return 0


def write_report(
    figures: dict[str, Any],
    samples: AnnotatedImages,
    truth: GroundTruth,
    found: Sequence[Found],
    folder: Path,
) -> Path:
    """Write figures, charts and page; returns the page's file.

    Args:
        figures: of the model, and of the second one.
        samples: the images, for the gallery.
        truth: the objects.
        found: the detections of each stage of the first model.
        folder: destination.
    """
    from detrelay.apps import report_gallery, report_queries, report_stages
    from detrelay.apps.evaluate import write_json
    from detrelay.apps.report_figures import left_out
    from detrelay.apps.report_page import models, write_page

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "figures.json", figures)
    sections = [
        report_stages.precision(figures),
        report_stages.instability(figures),
        report_stages.moved_labels(figures),
        report_stages.boxes(figures),
        report_stages.duplicates(figures),
        *report_queries.sections_of_queries(figures),
        report_stages.errors(figures),
        *report_gallery.gallery(figures, samples, truth, found),
    ]
    missing = [prefix + reason for prefix, m in models(figures) for reason in left_out(m)]
    return write_page(figures, sections, missing, folder)


def shown_truth(samples: AnnotatedImages, count: int) -> GroundTruth:
    """The objects in the first images."""
    from detrelay.core.evaluation.tables import GroundTruth

    content, shown = samples.ground_truth, set(samples.image_ids[:count])
    return GroundTruth.from_coco(
        {
            "images": [image for image in content["images"] if image["id"] in shown],
            "annotations": [row for row in content["annotations"] if row["image_id"] in shown],
            "categories": content["categories"],
        }
    )


def figures_of(
    source: Path, samples: AnnotatedImages, truth: GroundTruth, arguments: Arguments
) -> tuple[dict[str, Any], list[Found]]:
    """The figures of one model, and the detections of each stage."""
    from detrelay.apps.report_figures import NMS_IOU, SCORE_THRESHOLD, analyse, place
    from detrelay.apps.transformers_stages import is_foreign
    from detrelay.core.evaluation.backends import fastest_backend

    foreign = arguments.head is None and is_foreign(source)
    look = look_at_foreign if foreign else look_at_own
    recording, gates, model_type = look(source, samples, arguments)
    found = place(truth, recording)
    backend = arguments.backend or fastest_backend()
    about = {
        "model": str(source),
        "model_type": model_type,
        "data": str(arguments.data),
        "images": len(recording.image_ids),
        "objects": len(recording.cascade.image),
        "queries": recording.cascade.queries,
        "assigner": arguments.assigner,
        "max_detections": arguments.max_detections,
        "score_threshold": SCORE_THRESHOLD,
        "nms_iou": NMS_IOU,
        "backend": backend,
    }
    figures = analyse(
        truth,
        found,
        recording,
        gates,
        max_detections=arguments.max_detections,
        backend=backend,
        gallery=arguments.gallery,
    )
    categories = [category.name for category in samples.categories]
    return {"about": about, "categories": categories, **figures}, found


def look_at_own(
    source: Path, samples: AnnotatedImages, arguments: Arguments
) -> tuple[Recording, list[FilterGate], str]:
    """Record all stages and gates of a model of this project over the images; also its type."""
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    from detrelay.apps.build import eval_data, load_saved
    from detrelay.apps.evaluate import known_categories
    from detrelay.core.engine.loaders import make_eval_loader
    from detrelay.heads.stageinteractor.gates import watched_gates

    model, processor = load_saved(source, arguments.head)
    category_ids = known_categories(model, samples, data=arguments.data, source=source)
    classes = [category_ids.index(category.id) for category in samples.categories]
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("a report is made by one process; leave accelerate launch out")
    loader = make_eval_loader(
        eval_data(samples, processor),
        arguments.batch_size,
        processor.pad_size_divisor,
        images=number_of_images(samples, arguments),
    )
    losses, kind = model.loss_config, model.config.model_type
    model = accelerator.prepare(model)
    batches = (send_to_device(batch, accelerator.device) for batch in loader)
    with watched_gates(model) as gates:
        recording = record(model, batches, processor, category_ids, classes, losses, arguments)
    return recording, gates, kind


def look_at_foreign(
    source: Path, samples: AnnotatedImages, arguments: Arguments
) -> tuple[Recording, list[FilterGate], str]:
    """Record all stages of a transformers model over the images; also its type."""
    import torch
    from accelerate.utils import send_to_device

    from detrelay.apps.transformers_stages import (
        foreign_batches,
        foreign_categories,
        load_foreign,
    )
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.losses import LossConfig

    model, own_processor = load_foreign(source)
    category_ids, classes = foreign_categories(model, samples, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    indices = range(number_of_images(samples, arguments))
    batches = foreign_batches(samples, own_processor, indices)
    recording = record(
        model,
        (send_to_device(batch, device) for batch in batches),
        DetrelayImageProcessor(),
        category_ids,
        classes,
        LossConfig(),
        arguments,
    )
    return recording, [], str(model.config.model_type)


def number_of_images(samples: AnnotatedImages, arguments: Arguments) -> int:
    """Number of images used."""
    return min(len(samples), arguments.num_images or len(samples))


def record(
    model: Any,
    batches: Any,
    processor: DetrelayImageProcessor,
    category_ids: list[int],
    classes: list[int],
    losses: LossConfig,
    arguments: Arguments,
) -> Recording:
    """Record all stages over some batches, with a progress bar."""
    from tqdm import tqdm

    from detrelay.assigners import build_assigners
    from detrelay.core.evaluation.recording import record_stages

    with tqdm(desc="report", unit="batch") as bar:
        return record_stages(
            model,
            batches,
            processor,
            category_ids,
            classes,
            build_assigners("hungarian", losses)["decoder"],
            build_assigners(arguments.assigner, losses)["decoder"],
            arguments.max_detections,
            bar.update,
        )


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: report(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
