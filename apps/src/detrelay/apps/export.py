"""Export a saved model to another runtime, if the results match.

detrelay export --model runs/stageinteractor-cross_stage/best --format onnx --output exported
detrelay export --model USER/MODEL --format openvino --output exported --data val.json
detrelay export --model USER/MODEL --format openvino --output exported --precision int8 \
    --calibration train.json --data val.json
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

import tyro

from detrelay.apps.console import Debug, read_arguments, require_positive, run

if TYPE_CHECKING:
    from detrelay.core.export.report import Bounds


@dataclass(frozen=True)
class Arguments:
    """Export a saved model, measure it, and reject a file that differs from it."""

    model: Path
    """Folder of a saved model, or its name on the Hub."""
    format: Literal["onnx", "openvino", "torch-export"]
    """Format: for onnxruntime, for OpenVINO, or for torch.export.load."""
    output: Path
    """Folder to write, for ExportedDetector."""
    head: str | None = None
    """The model's head as module:ConfigClass, for a custom head."""
    data: Path | None = None
    """COCO json, or another dataset, to measure AP of both on."""
    images: Path | None = None
    """Folder of the images of --data; looked for near the json if not given."""
    precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """float16 halves the file; bfloat16 and int8 compute faster. All three need --data."""
    calibration: Path | None = None
    """COCO json, or another dataset, whose images determine the value ranges of int8."""
    calibration_images: int = 200
    """Number of images to use, spread over the dataset."""
    with_processing: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also write a file that takes an image and returns detections (not torch-export)."""
    max_logit_difference: float | None = None
    """Maximum difference of class scores (before the sigmoid)."""
    max_box_difference: float | None = None
    """Maximum difference of boxes, in units of the image."""
    max_ap_difference: float | None = None
    """Maximum difference of AP on --data, as a fraction (0.001: a tenth of a point)."""
    keep_refused: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep a file that differs by more, as OUTPUT.refused."""
    debug: Debug = False


def export(arguments: Arguments) -> int:
    """Write the folder and print the measurements; returns the exit code."""
    check(arguments)
    from detrelay.apps.export_data import Annotated, ap_of_both
    from detrelay.apps.saved import load_saved
    from detrelay.core.export.folder import export_detector

    source, data = arguments.model, arguments.data
    model, processor = load_saved(source, arguments.head)
    calibration, measure_ap = None, None
    if arguments.calibration is not None:
        most = arguments.calibration_images
        calibration = Annotated.read(
            arguments.calibration, arguments.images, model, source, most
        ).calibration()
    if data is not None:
        annotated = Annotated.read(data, arguments.images, model, source)
        measure_ap = ap_of_both(annotated, data.name, model, processor)
    report = export_detector(
        model,
        processor,
        arguments.format,
        arguments.output,
        bounds_of(arguments),
        precision=arguments.precision,
        calibration=calibration,
        with_processing=arguments.with_processing,
        measure_ap=measure_ap,
        keep_refused=arguments.keep_refused,
    )
    output = arguments.output
    print(report.page(), end="")
    print(f"\n{output}: {report.file} and {', '.join(_beside(output, report.file))}")
    return 0


def check(arguments: Arguments) -> None:
    """Reject impossible options before anything is loaded.

    Raises:
        ValueError: an option is out of range, or options contradict each other.
    """
    output, precision = arguments.output, arguments.precision
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output}: already exists; name a new folder")
    if arguments.images is not None and arguments.data is None:
        raise ValueError("--images is the folder of the images of --data; name --data too")
    for option in ("max_logit_difference", "max_box_difference", "max_ap_difference"):
        bound = getattr(arguments, option)
        if bound is not None and not bound >= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 0, found {bound}")
    if precision != "float32" and arguments.data is None:
        raise ValueError(f"--precision {precision} needs --data: the loss of AP on it is bounded")
    if (arguments.calibration is None) == (precision == "int8"):
        raise ValueError("--precision int8 and --calibration go together; name both or neither")
    require_positive(arguments, "calibration_images")
    from detrelay.core.export.runtimes import find_format, packages_of, require

    kind = find_format(arguments.format)
    if precision not in kind.precisions:
        raise ValueError(
            f"--format {arguments.format} has no --precision {precision}; it has "
            f"{', '.join(kind.precisions)}"
        )
    if arguments.with_processing and arguments.format == "torch-export":
        raise ValueError("--with-processing goes with --format onnx or openvino")
    require(arguments.format, packages_of(kind, precision))


def bounds_of(arguments: Arguments) -> Bounds:
    """The given bounds; for the others, the defaults of the precision."""
    from detrelay.core.export.report import Bounds

    exact = arguments.precision == "float32"
    named = (
        arguments.max_logit_difference,
        arguments.max_box_difference,
        arguments.max_ap_difference,
    )
    usual = (1e-3, 1e-4, 0.001) if exact else (None, None, 0.003)
    logits, boxes, ap = (
        default if bound is None else bound for bound, default in zip(named, usual, strict=True)
    )
    assert ap is not None
    named_none = arguments.max_logit_difference is None and arguments.max_box_difference is None
    return Bounds(logits, boxes, ap, roundings=2.0 if exact and named_none else 0.0)


def _beside(output: Path, file: str) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.name != file)


def main() -> NoReturn:
    """Run the command line."""
    run(lambda: export(read_arguments(Arguments)))


if __name__ == "__main__":
    main()
