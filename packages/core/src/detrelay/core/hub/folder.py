"""Prepare a model folder for upload: copied, completed, loaded and run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from detrelay.core.data.image_processing import DetrelayImageProcessor
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
from detrelay.core.hub.shim import SHIM, write_shim

_NEEDED = ("config.json", "preprocessor_config.json", run_folder.RECORD)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# other files of a model folder, apart from pictures for its card and the shards of its index
_OTHERS = frozenset({"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", SHIM, SPEED})
_PICTURES = {".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
CARD = "README.md"
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
        """Paths of the files, relative to the folder."""
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in found)


def complete_folder(source: Path, target: Path, repo_id: str, license: str | None) -> CheckedFolder:
    """Copy a saved model, add what is missing for the Hub, and try it.

    Hidden files are skipped; anything else that a model does not need is rejected, whatever its
    name. The shim is added, as are a card, if the folder has no README.md, and the picture of the
    run, if there is one. The source is not changed.

    Args:
        source: a folder as training writes it, such as `best` of a run.
        target: where the copy goes; must not exist.
        repo_id: name on the Hub, "user/model", for the card.
        license: identifier of the weights' licence, for the card; None for `default_license`.

    Raises:
        HubError: a file is missing, damaged or not to be published, or the model does not run.
    """
    training = _check_files(source)
    target.mkdir()
    for path in _shown(source):
        shutil.copyfile(path, target / path.name)
    model, processor = load_folder(target, str(source))
    logits, boxes = run_once(model, processor, str(source))
    write_shim(target, model, processor)
    _add_picture(source.resolve().parent, training, target)
    card = target / CARD
    try:
        if not card.is_file():
            speed = median_speed(source.resolve().parent / run_folder.METRICS)
            license = license or default_license(training)
            facts = CardFacts(model, training, target, speed, license)
            card.write_text(build_card(repo_id, facts), encoding="utf-8")
        check_card(card.read_text(encoding="utf-8"), str(source / CARD))
    except (ValueError, KeyError, TypeError, AttributeError, TemplateError) as error:
        raise HubError(
            f"{source}: no card can be made of training.json ({one_line(error)})"
            if not isinstance(error, ValueError)
            else one_line(error)
        ) from error
    return CheckedFolder(target, dict(model.state_dict()), logits, boxes)


def load_folder(
    source: str | Path, name: str, **hub: Any
) -> tuple[DetectorForObjectDetection, DetrelayImageProcessor]:
    """Model and processor through the Auto classes, without a network.

    Args:
        source: folder, or name on the Hub of a model in the cache.
        name: what to call it in messages.
        **hub: `revision` and `cache_dir` of a model in the cache.

    Raises:
        HubError: it cannot be loaded, or its weights are not exactly those of its config.
    """
    offline = {"local_files_only": True, "trust_remote_code": False, **hub}
    try:
        model, report = AutoModelForObjectDetection.from_pretrained(
            source, output_loading_info=True, use_safetensors=True, **offline
        )
        processor = AutoImageProcessor.from_pretrained(source, **offline)
    except Exception as error:
        raise HubError(
            f"{name}: cannot be loaded as a model ({one_line(error)}); a head must be registered "
            f"first, as `import detrelay.heads` does"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[kind])):
            raise HubError(
                f"{name}: its weights are not those of its config; {len(keys)} "
                f"{kind.replace('_', ' ')}, such as {keys[0]}"
            )
    if not isinstance(model, DetectorForObjectDetection):
        raise HubError(f"{name}: holds a {type(model).__name__}, not a detector of this project")
    if not isinstance(processor, DetrelayImageProcessor):
        raise HubError(
            f"{name}: its image processor is a {type(processor).__name__}, not a "
            f"DetrelayImageProcessor"
        )
    return model.eval(), processor


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
            output = model(**processor(images=image, return_tensors="pt"))
        processor.post_process_object_detection(output, 0.0, [_PROBE_SIZE])
    except Exception as error:
        raise HubError(f"{name}: the model does not run ({one_line(error)})") from error
    return output.logits, output.pred_boxes


def _check_files(folder: Path) -> Mapping[str, Any]:
    """The content of training.json, if all files exist and may be published."""
    for name in _NEEDED:
        if not (folder / name).is_file():
            inside = folder / run_folder.BEST
            hint = f"; did you mean {inside}?" if (inside / name).is_file() else ""
            if not hint and name == run_folder.RECORD:
                hint = " (facts of the training as a JSON object; {} if nothing is known)"
            raise HubError(
                f"{folder}: no published model can be made of it, it has no {name}{hint}"
            )
    weights, index = ((folder / name).is_file() for name in (_WEIGHTS, _INDEX))
    if weights == index:
        found = "both" if weights else "neither"
        raise HubError(f"{folder}: expected {_WEIGHTS} or {_INDEX} with its shards, found {found}")
    contents = {path.name: _content(path) for path in _shown(folder) if path.name != _INDEX}
    shards = set() if weights else _shards(folder / _INDEX)
    for name in contents:
        known = {*_NEEDED, *_OTHERS, *(shards or {_WEIGHTS})}
        if name not in known and Path(name).suffix.lower() not in _PICTURES:
            raise HubError(
                f"{folder / name}: pickles are not published, nor is anything else that a model "
                f"does not need; move it away"
            )
    training = contents[run_folder.RECORD]
    if not isinstance(training, dict):
        raise HubError(
            f"{folder / run_folder.RECORD}: expected an object with facts of the training"
        )
    return training


def _shown(folder: Path) -> list[Path]:
    """The visible files of a folder; folders and links in it are rejected."""
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in found:
        if path.is_symlink() or not path.is_file():
            raise HubError(
                f"{path}: a model folder holds plain files only, no folders and no links; move it "
                f"away"
            )
    return found


def _content(path: Path) -> Any:
    """The content of a file, read as far as needed to check that it matches its name.

    Weights are read when the model is loaded; the shim is rewritten.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if suffix in _PICTURES:
            with Image.open(path, formats=[_PICTURES[suffix]]) as picture:
                picture.verify()
        elif path.name in _OTHERS:
            path.read_text(encoding="utf-8")
    except (ValueError, OSError, SyntaxError, RecursionError) as error:
        kind = suffix.removeprefix(".") or "text"
        raise HubError(f"{path}: not {kind} ({one_line(error)})") from error
    return None


def _shards(index: Path) -> set[str]:
    """The files that an index of weights lists, and the index."""
    files = _content(index)
    try:
        return {_INDEX, *files["weight_map"].values()}
    except (TypeError, KeyError, AttributeError) as error:
        raise HubError(f"{index}: not an index of weights (it has no weight_map)") from error


def _add_picture(run: Path, training: Mapping[str, Any], target: Path) -> None:
    """Add the picture of predictions from the epoch of these weights, if the run drew one."""
    measured = training.get("measured")
    epoch = measured.get("epoch") if isinstance(measured, dict) else None
    picture = run / run_folder.PICTURES / f"epoch_{epoch}.png"
    if type(epoch) is not int or picture.is_symlink() or not picture.is_file():
        return
    if not (target / PICTURE).exists():
        _content(picture)
        shutil.copyfile(picture, target / PICTURE)
