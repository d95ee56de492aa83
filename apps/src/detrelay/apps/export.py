"""Write a saved model for another runtime, if it does there what it does here.

detrelay export --model runs/stageinteractor-cross_stage/best --format onnx --output exported
detrelay export --model USER/MODEL --format openvino --output exported --data val.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, run

if TYPE_CHECKING:
    from detrelay.core.data.image_processing import DetrelayImageProcessor
    from detrelay.core.detector.model import DetectorForObjectDetection
    from detrelay.core.export.detector import ExportedDetector
    from detrelay.core.export.report import Precision

_MAX_DETECTIONS = 100
_DRAWS = 1000


@dataclass(frozen=True)
class Arguments:
    """Export a saved model, measure it, and refuse a file that differs from it."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    format: Literal["onnx", "openvino", "torch-export"]
    """What to write: for onnxruntime, for OpenVINO, or for torch.export.load."""
    output: Path
    """Folder to write, for ExportedDetector."""
    head: str | None = None
    """The model's head as module:ConfigClass, if it is none of this project's."""
    data: Path | None = None
    """COCO json, or another data set, to measure AP of both on."""
    images: Path | None = None
    """Folder of the images of --data; the json's own surroundings if not named."""
    max_logit_difference: float = 1e-4
    """Largest difference of class scores (before the sigmoid) with which a file is written."""
    max_box_difference: float = 1e-5
    """Largest difference of boxes, in units of the image."""
    max_ap_difference: float = 0.001
    """Largest difference of AP on --data, as a fraction (0.001: a tenth of a point)."""
    keep_refused: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep a file that differs by more as OUTPUT.refused."""
    debug: Debug = False


def export(arguments: Arguments) -> int:
    """Write the folder and say what was measured; the exit code."""
    output = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: already there; name a new folder")
    if arguments.images is not None and arguments.data is None:
        raise ValueError("--images is about the file names in --data; name it too")
    for option in ("max_logit_difference", "max_box_difference", "max_ap_difference"):
        if not (bound := getattr(arguments, option)) >= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 0, found {bound}")
    from detrelay.core.export.runtimes import find_format, require

    kind = find_format(arguments.format)
    require(arguments.format, (*kind.to_write, *kind.to_run))

    from detrelay.apps.saved import load_saved
    from detrelay.core.export.folder import export_detector
    from detrelay.core.export.report import Bounds

    model, processor = load_saved(arguments.model, arguments.head)
    report = export_detector(
        model,
        processor,
        arguments.format,
        output,
        Bounds(
            arguments.max_logit_difference,
            arguments.max_box_difference,
            arguments.max_ap_difference,
        ),
        measure_ap=None
        if arguments.data is None
        else lambda exported: ap_of_both(arguments, model, processor, exported),
        keep_refused=arguments.keep_refused,
    )
    print(report.page(), end="")
    print(f"\n{output}: {report.file} and {', '.join(_beside(output, report.file))}")
    return 0


def _beside(output: Path, file: str) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.name != file)


def ap_of_both(
    arguments: Arguments,
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    exported: ExportedDetector,
) -> Precision:
    """AP of a model and of its exported file, with the interval of the difference.

    The file is measured as it will be used, with pixels and detections of `ExportedDetector`.
    """
    import numpy as np
    from accelerate import Accelerator

    from detrelay.apps import evaluate
    from detrelay.core.evaluation.coco_ap import evaluate_coco
    from detrelay.core.evaluation.matching import match
    from detrelay.core.evaluation.resampling import image_weights, resampled_ap
    from detrelay.core.evaluation.tables import Detections, GroundTruth
    from detrelay.core.export.report import Precision

    assert arguments.data is not None
    samples = evaluate.images_of(
        evaluate.Arguments(data=arguments.data, model=arguments.model, images=arguments.images)
    )
    ids = evaluate.known_categories(model, samples, data=arguments.data, source=arguments.model)
    if not samples.ground_truth["annotations"]:
        raise ValueError(f"{arguments.data}: has no annotations, so AP cannot be measured")
    truth = GroundTruth.from_coco(samples.ground_truth)
    ours = evaluate.detect_in(
        Accelerator(cpu=True), model, processor, samples, ids, _MAX_DETECTIONS
    )
    results = [
        exported(samples[row].image.permute(1, 2, 0).numpy(), 0.0, _MAX_DETECTIONS, clip=False)[0]
        for row in range(len(samples))
    ]
    theirs = Detections.from_results(results, samples.image_ids, ids)
    weights = image_weights(len(truth.image_ids), _DRAWS)
    present = np.array([category.id for category in samples.categories])
    ap, drawn = [], []
    for found in (ours, theirs):
        known = found.select(np.isin(found.category_ids, present))
        ap.append(evaluate_coco(truth, known).main[1])
        drawn.append(resampled_ap(match(truth, truth.place(known), _MAX_DETECTIONS), weights))
    low, high = np.percentile(drawn[1] - drawn[0], [2.5, 97.5]).tolist()
    return Precision(arguments.data.name, len(samples), ap[0], ap[1], (low, high))


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: export(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
