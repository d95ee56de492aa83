"""Run exported files: pixels in, class scores and boxes out. Does not import torch itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detrelay.core.errors import unknown_name

INPUTS = ("pixel_values", "pixel_mask")
OUTPUTS = ("logits", "pred_boxes")
# where an OpenVINO file records the precision it computes in, if not float32
COMPUTED_IN = ("detrelay", "computed_in")
Arrays = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[NDArray[np.float32], NDArray[np.int64]], Arrays]


@dataclass(frozen=True)
class Format:
    """A kind of exported file.

    Attributes:
        file: its name in the folder.
        opens: from the file and a number of threads (None: the runtime's default) to a function
            that runs it.
        to_run: packages needed to run it.
        to_write: packages needed to write it.
        extra: the extra of this project that installs them; None if nothing is needed.
        precisions: those that its weights or its computations can have.
    """

    file: str
    opens: Callable[[Path, int | None], Run]
    to_run: tuple[str, ...]
    to_write: tuple[str, ...]
    extra: str | None
    precisions: tuple[str, ...]


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(unknown_name("format", name, FORMATS))
    return FORMATS[name]


def packages_of(kind: Format, precision: str) -> tuple[str, ...]:
    """Packages needed to write and run a file; onnxruntime finds the ranges of int8."""
    ranges = ("onnxruntime",) if precision == "int8" else ()
    return (*kind.to_write, *kind.to_run, *ranges)


def require(name: str, packages: tuple[str, ...]) -> None:
    """Check that the packages needed for a format are installed.

    Raises:
        ValueError: one is not installed.
    """
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        extra = find_format(name).extra
        needed = f"'detrelay[{extra}]'" if extra else " ".join(missing)
        raise ValueError(
            f"the format {name} needs {', '.join(missing)}, not installed here: "
            f"pip install {needed}"
        )


def open_file(name: str, file: Path, threads: int | None = None) -> Run:
    """Open an exported file to run it.

    Args:
        name: its format.
        file: its path.
        threads: CPU threads; None for the runtime's default.

    Raises:
        ValueError: the format or its runtime is missing, or the file is not of this format.
    """
    kind = find_format(name)
    require(name, kind.to_run)
    if not file.is_file():
        raise ValueError(f"{file}: missing; export the model again")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, found {threads}")
    try:
        return kind.opens(file, threads)
    except Exception as error:  # the runtimes' errors on damaged files have no common base
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: cannot be opened as {name}: {line}") from error


def versions(name: str) -> dict[str, str]:
    """Versions of the packages of a format, by name."""
    kind = find_format(name)
    return {package: version(package) for package in ("torch", *kind.to_write, *kind.to_run)}


def _open_onnx(file: Path, threads: int | None) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(pixel_values: NDArray[np.float32], pixel_mask: NDArray[np.int64]) -> Arrays:
        feed = dict(zip(INPUTS, (pixel_values, pixel_mask), strict=True))
        logits, boxes = session.run(list(OUTPUTS), feed)
        return logits, boxes

    return run


def _open_openvino(file: Path, threads: int | None) -> Run:
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    model = core.read_model(str(file))
    recorded = model.has_rt_info(list(COMPUTED_IN))
    # on a CPU with bf16, OpenVINO would use it by default
    precision = model.get_rt_info(list(COMPUTED_IN)).astype(str) if recorded else "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)

    def run(pixel_values: NDArray[np.float32], pixel_mask: NDArray[np.int64]) -> Arrays:
        found = compiled([pixel_values, pixel_mask])
        return found[0].copy(), found[1].copy()

    return run


def _open_torch(file: Path, threads: int | None) -> Run:
    import torch

    module = torch.export.load(str(file)).module()

    def run(pixel_values: NDArray[np.float32], pixel_mask: NDArray[np.int64]) -> Arrays:
        before = torch.get_num_threads()  # a setting of the whole process
        torch.set_num_threads(threads or before)
        try:
            with torch.no_grad():
                logits, boxes = module(torch.from_numpy(pixel_values), torch.from_numpy(pixel_mask))
        finally:
            torch.set_num_threads(before)
        return logits.numpy(), boxes.numpy()

    return run


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "onnx": Format(
            "model.onnx",
            _open_onnx,
            ("onnxruntime",),
            ("onnx", "onnxscript"),
            "export",
            ("float32", "float16", "int8"),
        ),
        "openvino": Format(
            "model.xml",
            _open_openvino,
            ("openvino",),
            ("onnx", "onnxscript"),
            "openvino",
            ("float32", "float16", "bfloat16", "int8"),
        ),
        "torch-export": Format("model.pt2", _open_torch, ("torch",), (), None, ("float32",)),
    }
)
