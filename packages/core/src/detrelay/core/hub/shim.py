"""The file that lets transformers load a published model by `trust_remote_code=True`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

SHIM = "modeling_detrelay.py"

# The imports are in a `try`, or transformers would fail first with a message that only names the
# missing module.
_TEXT = '''\
"""Imports the Python package detrelay, which contains the code of this model."""

try:
{imports}
except ImportError as error:
    raise ImportError(
        f"this model needs the Python package detrelay and its dependencies ({{error}}); it was "
        "published with version {version}. Install it with `pip install detrelay`, or in a clone "
        "of its repository with `pip install -e .`, and load the model again."
    ) from error

__all__ = {names}
'''


def add_shim(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Write the shim into a folder, and let both settings name it when they are saved.

    Args:
        folder: will hold the saved model.
        model: the shim imports its class and that of its config.
        processor: its image processor.
    """
    classes = (type(model.config), type(model), type(processor))
    text = _TEXT.format(
        imports="\n".join(f"    from {cls.__module__} import {cls.__name__}" for cls in classes),
        version=version("detrelay"),
        names=[cls.__name__ for cls in classes],
    )
    (folder / SHIM).write_text(text, encoding="utf-8")
    autos = ("AutoConfig", "AutoModelForObjectDetection", "AutoImageProcessor")
    module = SHIM.removesuffix(".py")
    model.config.auto_map = {
        auto: f"{module}.{cls.__name__}" for auto, cls in zip(autos, classes, strict=True)
    }
    shown = {autos[2]: model.config.auto_map[autos[2]]}
    processor.auto_map = shown  # type: ignore[attr-defined]  # saved, though not declared
