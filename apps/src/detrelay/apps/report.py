"""What happens between the stages of a saved detector, as one page of charts.

detrelay report --model runs/stageinteractor-cross_stage/best --data val.json --output report
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from detrelay.apps.console import Debug, read_arguments, run

if TYPE_CHECKING:
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.evaluation.recording import Recording
    from detrelay.core.evaluation.tables import Found, GroundTruth
    from detrelay.core.losses import LossConfig

_THRESHOLD = 0.3
_NMS_IOU = 0.7


@dataclass(frozen=True)
class Arguments:
    """Write report.html, figures.json and the charts as PNG files."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    data: Path
    """Folder or file of annotated images in any known format; its val split, if it has splits."""
    output: Path
    """Folder for the report."""
    images: Path | None = None
    """Folder of the images; the surroundings of the annotations if not named."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    assigner: str = "cross_stage"
    """Whose labels are compared with each stage's own matching."""
    num_images: int | None = None
    """Only look at the first images."""
    gallery: int = 4
    """How many of the hardest images to show."""
    max_detections: int = 100
    """Boxes per image that count."""
    batch_size: int = 4
    """Images per batch."""
    backend: Literal["pycocotools", "hotcoco"] = "pycocotools"
    """Who computes AP; hotcoco gives the same figures faster (pip install 'detrelay[fast]')."""
    debug: Debug = False


def report(arguments: Arguments) -> int:
    """Run the model, analyse its stages, write the page; the exit code."""
    for name in ("max_detections", "batch_size", "num_images"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if arguments.gallery < 0:
        raise ValueError(f"--gallery must be at least 0, found {arguments.gallery}")

    from detrelay.apps.evaluate import write_json
    from detrelay.apps.report_page import write_page
    from detrelay.apps.transformers_stages import is_foreign
    from detrelay.core.data.coco import AnnotatedImages
    from detrelay.core.data.places import evaluation_split
    from detrelay.core.evaluation.tables import GroundTruth

    samples = AnnotatedImages(evaluation_split(str(arguments.data), arguments.images))
    foreign = arguments.head is None and is_foreign(arguments.model)
    look = look_at_foreign if foreign else look_at_own
    recording, model_type = look(samples, arguments)
    content = samples.ground_truth
    shown = set(recording.image_ids.tolist())
    truth = GroundTruth.from_coco(
        {
            "images": [image for image in content["images"] if image["id"] in shown],
            "annotations": [row for row in content["annotations"] if row["image_id"] in shown],
            "categories": content["categories"],
        }
    )
    found = place(truth, recording)
    figures = analyse(truth, found, recording, len(samples.categories), arguments)
    figures["categories"] = [category.name for category in samples.categories]
    figures["about"] = {
        "model": str(arguments.model),
        "model_type": model_type,
        "data": str(arguments.data),
        "images": len(recording.image_ids),
        "objects": len(recording.cascade.image),
        "queries": recording.cascade.queries,
        "assigner": arguments.assigner,
        "max_detections": arguments.max_detections,
        "score_threshold": _THRESHOLD,
        "nms_iou": _NMS_IOU,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "figures.json", figures)
    page = write_page(figures, samples, truth, found, arguments.output)
    by_stage = "  ".join(f"{100 * stage['stats']['AP']:.1f}" for stage in figures["stages"])
    print(f"AP by stage (maxDets {min(100, arguments.max_detections)}): {by_stage}")
    print(f"report -> {page}")
    return 0


def look_at_own(samples: AnnotatedImages, arguments: Arguments) -> tuple[Recording, str]:
    """Record all stages of a model of this project over the images; also its type."""
    from accelerate import Accelerator

    from detrelay.apps.build import eval_data, load_saved
    from detrelay.apps.evaluate import known_categories
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.data.transforms import VisitSampler
    from detrelay.core.engine.loaders import make_loader

    model, processor = load_saved(arguments.model, arguments.head)
    category_ids = known_categories(model, samples, data=arguments.data, source=arguments.model)
    classes = [category_ids.index(category.id) for category in samples.categories]
    sampler = VisitSampler(number_of_images(samples, arguments), seed=0, shuffle=False)
    loader = make_loader(
        eval_data(samples, processor),
        sampler,
        arguments.batch_size,
        divisor=processor.pad_size_divisor,
    )
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("a report is made by one process; leave accelerate launch out")
    losses, kind = model.loss_config, model.config.model_type
    model, loader = accelerator.prepare(model, loader)
    assert isinstance(processor, DetrelayImageProcessor)
    return record(model, loader, processor, category_ids, classes, losses, arguments), kind


def look_at_foreign(samples: AnnotatedImages, arguments: Arguments) -> tuple[Recording, str]:
    """Record all stages of a model of transformers over the images; also its type."""
    import torch

    from detrelay.apps.transformers_stages import (
        foreign_batches,
        foreign_categories,
        load_foreign,
    )
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.losses import LossConfig

    model, own_processor = load_foreign(arguments.model)
    category_ids, classes = foreign_categories(model, samples, arguments.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    indices = range(number_of_images(samples, arguments))
    batches = foreign_batches(samples, own_processor, indices)
    on_device = (
        {
            "pixel_values": batch["pixel_values"].to(device),
            "pixel_mask": batch["pixel_mask"].to(device),
            "labels": [
                {key: value.to(device) for key, value in label.items()} for label in batch["labels"]
            ],
        }
        for batch in batches
    )
    recording = record(
        model, on_device, DetrelayImageProcessor(), category_ids, classes, LossConfig(), arguments
    )
    return recording, str(model.config.model_type)


def number_of_images(samples: AnnotatedImages, arguments: Arguments) -> int:
    """How many images are looked at."""
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
    """Record all stages over some batches, with a bar of progress."""
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


def place(truth: GroundTruth, recording: Recording) -> list[Found]:
    """What each stage found, of the categories that the data have."""
    import numpy as np

    return [
        truth.place(part.select(np.isin(part.category_ids, truth.category_ids)))
        for part in recording.detections
    ]


def analyse(
    truth: GroundTruth,
    found: list[Found],
    recording: Recording,
    categories: int,
    arguments: Arguments,
) -> dict[str, Any]:
    """All figures of the page, as plain numbers."""
    from detrelay.core.evaluation import cascade as analysis
    from detrelay.core.evaluation.tide import error_breakdown

    cascade = recording.cascade
    moved = analysis.moved_labels(cascade, categories)
    hardest = analysis.hardest_images(
        truth, found[-1], _THRESHOLD, arguments.max_detections, arguments.gallery
    )
    return {
        "stages": [stage_figures(truth, part, arguments) for part in found],
        "errors": [
            asdict(error_breakdown(truth, part, max_detections=arguments.max_detections))
            for part in found
        ],
        "instability": [
            asdict(entry) | {"moved_share": entry.moved_share, "changed_share": entry.changed_share}
            for entry in analysis.instability(cascade)
        ],
        "moved_labels": {
            key: value if isinstance(value, list) else value.tolist()
            for key, value in asdict(moved).items()
        },
        "refinement": asdict(analysis.refinement(cascade)),
        "similarity": None
        if recording.similarity is None
        else recording.similarity.matrix().tolist(),
        "hardest": [
            asdict(entry) | {"image_id": int(truth.image_ids[entry.image])} for entry in hardest
        ],
    }


def stage_figures(truth: GroundTruth, found: Found, arguments: Arguments) -> dict[str, Any]:
    """AP and duplicates of one stage, with and without non-maximum suppression."""
    from detrelay.core.evaluation.backends import accumulate
    from detrelay.core.evaluation.cascade import duplicates, suppress
    from detrelay.core.evaluation.coco_ap import limits_of, summarize

    limits = limits_of(arguments.max_detections)
    kept = suppress(found, _NMS_IOU)
    scores, scores_after = (
        summarize(
            accumulate(truth, part, limits, arguments.backend),
            truth.names,
            arguments.max_detections,
        )
        for part in (found, kept)
    )
    before, after = (duplicates(truth, part, _THRESHOLD) for part in (found, kept))
    return {
        **scores.to_dict(),
        "AP_after_nms": scores_after.stats["AP"],
        "duplicates": asdict(before) | {"surplus": before.surplus},
        "duplicates_after_nms": asdict(after) | {"surplus": after.surplus},
    }


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: report(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
