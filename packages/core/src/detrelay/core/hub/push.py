"""Publish a model in memory, as the command publishes a folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.loading import load_processor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine import run_folder
from detrelay.core.engine.checkpoint import save_model
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.publish import Published, publish


def push_model(
    model: DetectorForObjectDetection,
    repo_id: str,
    *,
    processor: DetrelayImageProcessor | None = None,
    training: Mapping[str, Any] | None = None,
    **options: Any,
) -> Published:
    """Save a model with its processor and the facts of its training, and publish the folder.

    Args:
        model: any detector.
        repo_id: "user/model", or "model" for the owner of the token.
        processor: None for that of the folder, or of the model on the Hub, that it came from.
        training: facts of its training, for the card; None for those stored with the loaded
            weights, if the model still has exactly these weights, otherwise for its starting
            point only.
        **options: `private`, `token`, `tag`, `license` and `commit_message` of `publish`.

    Raises:
        HubError: no processor is known, or see `publish`.
    """
    source = str(model.config.name_or_path or "")
    processor = processor or _processor_of(source, repo_id)
    training = _facts_of(model, source) if training is None else training
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(model, processor, training, folder)
        return publish(folder, repo_id, **options)


def _processor_of(source: str, repo_id: str) -> DetrelayImageProcessor:
    if not source:
        raise HubError(
            f"{repo_id}: the model was not loaded from a folder, so no image processor is known; "
            f"pass processor=DetrelayImageProcessor(...)"
        )
    try:
        return load_processor(source, source)
    except ValueError as error:
        raise HubError(f"{repo_id}: {error}; pass processor=DetrelayImageProcessor(...)") from error


def _facts_of(model: DetectorForObjectDetection, source: str) -> dict[str, Any]:
    """Facts about exactly these weights; figures measured before weights changed are dropped."""
    if not source:
        return {}
    file = cached_file(source, run_folder.RECORD, _raise_exceptions_for_missing_entries=False)
    if file is None or not _has_weights_of(model, source):
        return {"init": source}
    facts: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return facts


def _has_weights_of(model: DetectorForObjectDetection, source: str) -> bool:
    saved = type(model).from_pretrained(source).state_dict()
    own = model.state_dict()
    return own.keys() == saved.keys() and all(
        value.dtype == saved[key].dtype and torch.equal(value.cpu(), saved[key])
        for key, value in own.items()
    )
