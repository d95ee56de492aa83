"""The file that lets transformers load a published model by `trust_remote_code=True`."""

from __future__ import annotations

import json
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


def write_shim(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Add the shim to a saved model and name it in its two configs.

    Args:
        folder: contains config.json and preprocessor_config.json.
        model: the model in the folder; the shim imports its class and that of its config.
        processor: its image processor.
    """
    classes = (type(model.config), type(model), type(processor))
    text = _TEXT.format(
        imports="\n".join(f"    from {cls.__module__} import {cls.__name__}" for cls in classes),
        version=version("detrelay"),
        names=[cls.__name__ for cls in classes],
    )
    (folder / SHIM).write_text(text, encoding="utf-8")
    module = SHIM.removesuffix(".py")
    config, detector, image_processor = (f"{module}.{cls.__name__}" for cls in classes)
    _add(folder / "preprocessor_config.json", {"AutoImageProcessor": image_processor})
    _add(
        folder / "config.json",
        {
            "AutoConfig": config,
            "AutoModelForObjectDetection": detector,
            "AutoImageProcessor": image_processor,
        },
    )


def _add(file: Path, auto_map: dict[str, str]) -> None:
    values = json.loads(file.read_text(encoding="utf-8"))
    values["auto_map"] = auto_map
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
