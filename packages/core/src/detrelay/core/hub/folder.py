"""Prepare a model folder for upload: loaded, run, saved again and completed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.loading import load_model, load_processor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine import run_folder
from detrelay.core.errors import one_line
from detrelay.core.hub.calls import HubError
from detrelay.core.hub.card import (
    PICTURE,
    SPEED,
    CardFacts,
    build_card,
    check_card,
    default_license,
    median_speed,
)
from detrelay.core.hub.shim import SHIM, add_shim

CARD = "README.md"
_NEEDED = ("config.json", "preprocessor_config.json", run_folder.RECORD)
_WEIGHTS = (".safetensors", ".safetensors.index.json")
# what is copied, apart from pictures for the card
_TEXTS = frozenset({CARD, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", SPEED})
_PICTURES = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_PROBE_SIZE = (96, 128)


@dataclass(frozen=True)
class CheckedFolder:
    """A complete model folder that has been loaded and run.

    Attributes:
        folder: every file that is uploaded.
        weights: the state dict that it loads.
        logits: float [1, Q, K], the model's output for an image of noise.
        boxes: float [1, Q, 4], cxcywh in [0, 1], likewise.
    """

    folder: Path
    weights: dict[str, Tensor]
    logits: Tensor
    boxes: Tensor

    @property
    def files(self) -> list[str]:
        """Names of the files."""
        return sorted(path.name for path in self.folder.iterdir())


def complete_folder(source: Path, target: Path, repo_id: str, license: str | None) -> CheckedFolder:
    """Load a saved model, try it, and save it again with what is missing for the Hub.

    Settings and weights are written from the loaded model, so that nothing else is uploaded under
    their names. Texts and pictures are copied. Hidden files are skipped; any other file is
    rejected. The shim is added, as are a card, if the folder has no README.md, and the picture of
    the run, if there is one. The source is not changed.

    Args:
        source: a folder as training writes it, such as `best` of a run.
        target: the new folder; must not exist.
        repo_id: name on the Hub, "user/model", for the card.
        license: identifier of the weights' licence, for the card; None for `default_license`.

    Raises:
        ValueError: a file is missing, damaged or not to be published, or the model does not run.
    """
    extras = _extras(source)
    training = _facts(source)
    model = load_model(source, str(source), local_files_only=True)
    processor = load_processor(source, str(source), local_files_only=True)
    logits, boxes = run_once(model, processor, str(source))
    target.mkdir()
    add_shim(target, model, processor)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    shutil.copyfile(source / run_folder.RECORD, target / run_folder.RECORD)
    for path in extras:
        _copy(path, target / path.name)
    _add_picture(source.resolve().parent, training, target)
    card = target / CARD
    if not card.is_file():
        speed = median_speed(source.resolve().parent / run_folder.METRICS)
        facts = CardFacts(model, training, target, speed, license or default_license(training))
        try:
            card.write_text(build_card(repo_id, facts), encoding="utf-8")
        except Exception as error:  # of the template, or of facts of any shape
            raise HubError(
                f"{source}: no card can be made of training.json ({one_line(error)})"
            ) from error
    check_card(card.read_text(encoding="utf-8"), str(source / CARD))
    return CheckedFolder(target, dict(model.state_dict()), logits, boxes)


def run_once(
    model: DetectorForObjectDetection, processor: DetrelayImageProcessor, name: str
) -> tuple[Tensor, Tensor]:
    """Logits and boxes for a fixed image of noise.

    Raises:
        HubError: the model fails on it or its output is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *_PROBE_SIZE), generator=generator, dtype=torch.uint8)
    try:
        with torch.no_grad():
            output = model.eval()(**processor(images=image, return_tensors="pt"))
        processor.post_process_object_detection(output, 0.0, [_PROBE_SIZE])
    except Exception as error:
        raise HubError(f"{name}: the model does not run ({one_line(error)})") from error
    return output.logits, output.pred_boxes


def _facts(folder: Path) -> Mapping[str, Any]:
    """The content of training.json."""
    file = folder / run_folder.RECORD
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HubError(f"{file}: not JSON ({one_line(error)})") from error
    if not isinstance(facts, dict):
        raise HubError(f"{file}: expected an object with facts of the training")
    return facts


def _extras(folder: Path) -> list[Path]:
    """The files that are uploaded as they are; rejects what a model does not need."""
    for name in _NEEDED:
        if not (folder / name).is_file():
            best = folder / run_folder.BEST
            hint = f"; did you mean {best}?" if best.is_dir() else ""
            if name == run_folder.RECORD:
                hint = " (facts of the training as a JSON object; {} if nothing is known)"
            raise HubError(
                f"{folder}: no published model can be made of it, it has no {name}{hint}"
            )
    extras = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() or not path.is_file():
            raise HubError(
                f"{path}: a model folder holds plain files only, no folders and no links; move it "
                f"away"
            )
        if path.name in _TEXTS or path.suffix.lower() in _PICTURES:
            extras.append(path)
        elif path.name not in (*_NEEDED, SHIM) and not path.name.endswith(_WEIGHTS):
            raise HubError(
                f"{path}: pickles are not published, nor is anything else that a model does not "
                f"need; move it away"
            )
    return extras


def _copy(path: Path, target: Path) -> None:
    """Copy a text or a picture that is what its name says."""
    kind = _PICTURES.get(path.suffix.lower())
    try:
        if kind is None:
            path.read_text(encoding="utf-8")
        else:
            with Image.open(path, formats=[kind]) as picture:
                picture.verify()
    except (ValueError, OSError, SyntaxError) as error:
        raise HubError(f"{path}: not {kind or 'text'} ({one_line(error)})") from error
    shutil.copyfile(path, target)


def _add_picture(run: Path, training: Mapping[str, Any], target: Path) -> None:
    """Add the picture of predictions from the epoch of these weights, if the run drew one."""
    measured = training.get("measured")
    epoch = measured.get("epoch") if isinstance(measured, dict) else None
    picture = run / run_folder.PICTURES / f"epoch_{epoch}.png"
    if type(epoch) is not int or picture.is_symlink() or not picture.is_file():
        return
    if not (target / PICTURE).exists():
        _copy(picture, target / PICTURE)
