"""Export to a folder: traced, written, reopened, measured, and only then given its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.atomic_folder import aside_of, remove, replace, sync
from detrelay.core.export import runtimes
from detrelay.core.export.comparison import compare, measure, rounding_of, shapes_of
from detrelay.core.export.detector import ExportedDetector, Facts
from detrelay.core.export.pixels import PixelSettings
from detrelay.core.export.processing import check_processing
from detrelay.core.export.quantization import Calibration, Trial, quantize_parts
from detrelay.core.export.report import Bounds, ExportReport, Precision
from detrelay.core.export.writing import trace, write_file, write_onnx

# measures AP of both; it gets the exported detector
Measure = Callable[[ExportedDetector], Precision]


class ExportRefused(ValueError):
    """An exported file differs from its model by more than was allowed."""


def export_detector(
    model: DetectorForObjectDetection,
    processor: DetrelayImageProcessor,
    name: str,
    output: Path,
    bounds: Bounds,
    *,
    precision: str = "float32",
    calibration: Calibration | None = None,
    with_processing: bool = False,
    measure_ap: Measure | None = None,
    keep_refused: bool = False,
) -> ExportReport:
    """Write a folder for `ExportedDetector`, if its file matches the model.

    Args:
        model: in float32, on the CPU.
        processor: its image processor.
        name: the format.
        output: the folder; one of that name is replaced.
        bounds: the largest differences allowed.
        precision: of the file, one of those of its format.
        calibration: images for int8.
        with_processing: write a second file that takes an image and gives detections.
        measure_ap: measures AP of both.
        keep_refused: if a difference is larger, write the folder as `OUTPUT.refused`.

    Returns:
        The measurements.

    Raises:
        ExportRefused: a difference is beyond its bound.
        ValueError: the model, its image processor or the format cannot be exported.
    """
    kind = runtimes.find_format(name)
    runtimes.require(name, runtimes.packages_of(kind, precision))
    config = model.config
    facts = Facts(name, config.class_names, config.category_ids, PixelSettings.of(processor))
    within = facts.pixels if with_processing else None
    if within is not None:
        check_processing(within)
    aside = aside_of(output)
    aside.mkdir(parents=True, exist_ok=True)
    try:
        check = _Check(measure_ap, bounds.ap)
        particular, trials = _write(model, aside, facts, check, precision, calibration, within)
        facts.write(aside)
        processor.save_pretrained(aside)
        report = _report(model, aside, particular, bounds, check, trials)
        report.write(aside)
        sync(aside)
        _refuse_beyond(report, aside, output, keep_refused)
        replace(aside, output)
    finally:
        if aside.exists():
            remove(aside)
    return report


def _refuse_beyond(report: ExportReport, aside: Path, output: Path, keep_refused: bool) -> None:
    beyond = "; ".join(report.refusals())
    if not beyond:
        return
    end = "--keep-refused keeps it for inspection"
    if keep_refused:
        kept = output.with_name(f"{output.name}.refused")
        replace(aside, kept)
        end = f"kept as {kept}"
    raise ExportRefused(
        f"{output}: not written, since {report.file} differs from its model: {beyond}; {end}"
    )


@dataclass
class _Check:
    """Whether files lose AP.

    Attributes:
        measure_ap: see `export_detector`.
        bound: the largest difference allowed.
        last: what was measured last.
    """

    measure_ap: Measure | None
    bound: float
    last: Precision | None = None

    def accepts(self, folder: Path) -> bool:
        """Measure an exported folder, if that is wanted."""
        if self.measure_ap is None:
            return True
        self.last = self.measure_ap(ExportedDetector(folder, threads=1))
        return abs(self.last.difference) <= self.bound


def _write(
    model: DetectorForObjectDetection,
    folder: Path,
    facts: Facts,
    check: _Check,
    precision: str,
    calibration: Calibration | None,
    processing: PixelSettings | None,
) -> tuple[dict[str, Any], list[Trial]]:
    """Trace and write; returns facts specific to the file, and the trials of parts in 8 bits."""
    program = trace(model)
    kind = runtimes.find_format(facts.format)
    if facts.format == "torch-export":
        torch.export.save(program, str(folder / kind.file))
        return {}, []
    between, quantized = folder / "float32.onnx", folder / "int8.onnx"
    particular = write_onnx(program, between)
    trials: list[Trial] = []
    if precision == "int8":
        assert calibration is not None
        trials = quantize_parts(between, quantized, facts, calibration, check.bound, check.accepts)
        quantized.replace(between)
    write_file(between, facts.format, folder, precision, processing)
    between.unlink()
    return {**particular, "precision": precision}, trials


def _report(
    model: DetectorForObjectDetection,
    folder: Path,
    particular: Mapping[str, Any],
    bounds: Bounds,
    check: _Check,
    trials: Sequence[Trial],
) -> ExportReport:
    """Measure the file in a folder."""
    exported = ExportedDetector(folder, threads=1)
    name = exported.format
    shapes = shapes_of(exported.pixels.shortest_edge)
    report = ExportReport(
        format=name,
        file=runtimes.find_format(name).file,
        bytes=sum(path.stat().st_size for path in folder.glob("model.*")),
        facts=dict(particular),
        versions=runtimes.versions(name),
        bounds=bounds,
        differences=compare(model, exported.run, shapes),
        times=measure(model, exported.run, shapes[0]),
        precision=check.last or (check.measure_ap(exported) if check.measure_ap else None),
        trials=trials,
    )
    if report.refusals() and bounds.roundings:
        report = dataclasses.replace(report, rounding=rounding_of(model, shapes))
    return report
