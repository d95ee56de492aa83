"""Exported files whose layers compute with 8-bit integers, part by part as far as AP bears it.

A layer is a convolution or a linear map whose weights the file holds. Its weights are rounded to
int8 by output channel, its inputs to uint8 by ranges found on images of the user's. Everything else
stays float32: attention, sampling, filters that the model makes itself, normalisation.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from detrelay.core.data.decode import Pixels
from detrelay.core.engine.atomic_folder import remove
from detrelay.core.export.chunks import sort_nodes
from detrelay.core.export.detections import Detection
from detrelay.core.export.detector import ExportedDetector, Facts
from detrelay.core.export.pixels import PixelSettings, prepare
from detrelay.core.export.runtimes import INPUTS
from detrelay.core.export.writing import write_file

# from what computes most to what decides most; a part without layers is passed over
PARTS = ("backbone", "neck", "encoder", "decoder", "branches")
_BRANCHES = ("classify", "refine")  # how the heads' class and box branches are called
_LAYERS = ("Conv", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"
_MAX_DETECTIONS = 100


@dataclass(frozen=True)
class Calibration:
    """Images of the kind that the model is used on.

    Attributes:
        images: each uint8 [H, W, 3].
        ap: AP as a fraction of detections in these images, in their order.
    """

    images: Sequence[Pixels]
    ap: Callable[[Sequence[Detection]], float]


@dataclass(frozen=True)
class Trial:
    """What 8 bits in one more part did to the calibration images.

    Attributes:
        part: of `PARTS`; "float32" for the file without any.
        layers: how many of it can be in 8 bits.
        ap: AP as a fraction, with the parts kept before it in 8 bits too.
        seconds: of an image on one thread, pixels and detections included, median.
        kept: whether the part is in 8 bits in the file written.
        returned: whether it was kept by this AP, but the whole file failed elsewhere with it.
    """

    part: str
    layers: int
    ap: float
    seconds: float
    kept: bool
    returned: bool = False


def quantize_parts(
    base: Path,
    target: Path,
    facts: Facts,
    calibration: Calibration,
    bound: float,
    accepts: Callable[[Path], bool] = lambda folder: True,
) -> list[Trial]:
    """Write an ONNX file with as many parts in 8 bits as leave AP alone.

    Parts are tried in the order of `PARTS`, each on top of those kept before it. One is kept if AP
    on the calibration images stays within the bound of the float file's. If the file that
    results is not accepted, its parts return to float32 one by one, the last one first.

    Args:
        base: the detector as float ONNX file.
        target: the file to write; work goes on beside it.
        facts: of the exported folder; its format is what AP and time are taken in.
        calibration: images for ranges and AP.
        bound: largest difference of AP allowed.
        accepts: whether an exported folder is as good as the model on other images.

    Returns:
        All trials, the float file's first.

    Raises:
        ValueError: no part can be in 8 bits.
    """
    layers = layers_by_part(importlib.import_module("onnx").load(base))
    place, ranges = target.with_name("trial"), target.with_name("ranges.json")
    tried = target.with_name("tried.onnx")
    try:
        save(base, place, facts)
        ap, seconds = _judge(place, calibration)
        trials = [Trial("float32", sum(map(len, layers.values())), ap, seconds, True)]
        kept: list[str] = []
        for part, names in layers.items():
            quantize(base, tried, [*_nodes(layers, kept), *names], calibration, facts, ranges)
            save(tried, place, facts)
            ap, seconds = _judge(place, calibration)
            keep = abs(ap - trials[0].ap) <= bound
            trials.append(Trial(part, len(names), ap, seconds, keep))
            if keep:
                kept.append(part)
                tried.replace(target)
        while kept:
            save(target, place, facts)
            if accepts(place):
                break
            trials = _without(trials, kept.pop())
            if kept:
                quantize(base, target, _nodes(layers, kept), calibration, facts, ranges)
    finally:
        ranges.unlink(missing_ok=True)
        tried.unlink(missing_ok=True)
        if place.exists():
            remove(place)
    if not kept:
        raise ValueError(_refusal(trials, bound))
    return trials


def _nodes(layers: Mapping[str, Sequence[str]], parts: Sequence[str]) -> list[str]:
    return [name for part in parts for name in layers[part]]


def _without(trials: Sequence[Trial], part: str) -> list[Trial]:
    return [replace(t, kept=False, returned=True) if t.part == part else t for t in trials]


def _refusal(trials: Sequence[Trial], bound: float) -> str:
    found = ", ".join(f"{trial.part} {100 * trial.ap:.2f}" for trial in trials)
    lost = "what passed loses more than that on the other images; "
    return (
        f"no part can be in 8 bits: AP on the calibration images is {found}, and {100 * bound:g} "
        f"points are allowed; {lost if any(trial.returned for trial in trials) else ''}name more "
        f"calibration images like those that the model is used on, or another --precision"
    )


def layers_by_part(model: Any) -> dict[str, list[str]]:
    """Names of the nodes of an ONNX model that can be in 8 bits, by part in the order of `PARTS`.

    Raises:
        ValueError: nodes do not say which module they come from.
    """
    held = {weight.name for weight in model.graph.initializer}
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for node in model.graph.node:
        if node.op_type in _LAYERS and node.input[1] in held:
            found[part_of(_scopes(node))].append(node.name)
    return {part: names for part, names in found.items() if names}


def part_of(path: str) -> str:
    """The part that a module belongs to, by its path in the detector such as head.encoder.layers.0.

    Whatever of the head is neither encoder nor branch counts as decoder.
    """
    first, *inner = path.split(".")
    if first != "head":
        return first if first in PARTS else "backbone"
    if any(name.startswith(_BRANCHES) for name in inner):
        return "branches"
    return "encoder" if inner and inner[0] == "encoder" else "decoder"


def _scopes(node: Any) -> str:
    """Path of the innermost module that a node comes from."""
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            paths = [scope for scope in json.loads(entry.value.replace("'", '"')) if "." in scope]
            if paths:
                return str(max(paths, key=len)).removeprefix("model.")
    raise ValueError(f"{node.name}: does not say which module it comes from; export it again")


def quantize(
    base: Path,
    target: Path,
    names: Sequence[str],
    calibration: Calibration,
    facts: Facts,
    ranges: Path,
) -> None:
    """Write an ONNX file whose named nodes compute in 8 bits.

    Args:
        base: the float file.
        target: the file to write.
        names: nodes of `layers_by_part`.
        calibration: images for the ranges of their inputs.
        facts: of the exported folder: how images become pixels.
        ranges: file of the ranges, made by the first call.
    """
    onnx = importlib.import_module("onnx")
    tools = importlib.import_module("onnxruntime.quantization")
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)  # it warns through the root logger
    try:
        tools.quantize_static(
            base,
            target,
            _Reader(calibration, facts.pixels),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=list(_LAYERS),
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            nodes_to_quantize=list(names),
            calibration_cache_path=ranges,
        )
    finally:
        root.setLevel(before)
    written = onnx.load(target)
    sort_nodes(written)
    onnx.save(written, target)


class _Reader:
    """The calibration images as inputs, one at a time, for onnxruntime."""

    def __init__(self, calibration: Calibration, settings: PixelSettings) -> None:
        self._feeds = self._make(calibration, settings)

    @staticmethod
    def _make(
        calibration: Calibration, settings: PixelSettings
    ) -> Iterator[dict[str, NDArray[Any]]]:
        for image in calibration.images:
            yield dict(zip(INPUTS, prepare([image], settings), strict=True))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next inputs; None after the last."""
        return next(self._feeds, None)


def save(source: Path, folder: Path, facts: Facts) -> None:
    """An exported folder of an ONNX file, in the format that the facts name."""
    folder.mkdir(exist_ok=True)
    write_file(source, facts.format, folder)
    facts.write(folder)


def _judge(folder: Path, calibration: Calibration) -> tuple[float, float]:
    """AP on the calibration images, and the median time of one on one thread."""
    detector = ExportedDetector(folder, threads=1)
    found, seconds = [], []
    for image in calibration.images:
        start = time.perf_counter()
        found += detector(image, 0.0, _MAX_DETECTIONS, clip=False)
        seconds.append(time.perf_counter() - start)
    return calibration.ap(found), float(median(seconds))
