"""Load a saved detector whole, or not at all: no code from its folder, no pickles, no guesses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.utils import logging as transformers_logging

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.errors import one_line

_UNREGISTERED = "does not recognize this architecture"


def load_model(
    source: str | Path, name: str, kind: Any = AutoModelForObjectDetection, **options: Any
) -> DetectorForObjectDetection:
    """A detector with all of its weights, in the dtype of its file unless told otherwise.

    Args:
        source: folder, or name on the Hub.
        name: what to call it in messages.
        kind: class that loads it.
        **options: of `from_pretrained`.

    Raises:
        ValueError: it cannot be loaded, is no detector, or its weights are not exactly those of the
            model in its config.json.
    """
    try:
        with _quiet_loading():  # transformers would print a table of mismatches
            model, report = kind.from_pretrained(
                source,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:
        hint = "; register its head first, as `import detrelay.heads` does"
        raise ValueError(
            f"{name}: cannot be loaded as a model: {one_line(error)}"
            f"{hint if _UNREGISTERED in str(error) else ''}"
        ) from error
    if not isinstance(model, DetectorForObjectDetection):
        raise ValueError(f"{name}: holds a {type(model).__name__}, not a detector of this project")
    _refuse_incomplete(name, report)
    return model


def load_processor(source: str | Path, name: str, **options: Any) -> DetrelayImageProcessor:
    """The image processor of a saved detector.

    Args:
        source: folder, or name on the Hub.
        name: what to call it in messages.
        **options: of `from_pretrained`.

    Raises:
        ValueError: there is none, or it is another program's.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise ValueError(
            f"{name}: its image processor cannot be loaded: {one_line(error)}"
        ) from error
    if not isinstance(processor, DetrelayImageProcessor):
        raise ValueError(
            f"{name}: its image processor is a {type(processor).__name__}, which prepares other "
            f"pixels than the model has learned from; expected a DetrelayImageProcessor in "
            f"preprocessor_config.json"
        )
    return processor


@contextmanager
def _quiet_loading() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _refuse_incomplete(name: str, report: Mapping[str, Any]) -> None:
    """Reject weights that differ from those of the model, by transformers' loading report."""
    kinds = {
        "missing": sorted(report["missing_keys"]),
        "unknown": sorted(report["unexpected_keys"]),
        "of another shape": sorted(key for key, *_ in report["mismatched_keys"]),
    }
    found = [f"{len(keys)} {kind} (such as {keys[0]})" for kind, keys in kinds.items() if keys]
    if found:
        raise ValueError(
            f"{name}: its weights are not those of the model in its config.json: "
            f"{', '.join(found)}; save or download the model again"
        )
