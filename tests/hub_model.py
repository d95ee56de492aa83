"""The smallest trained run, and a process that knows only the test's Hub."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from detrelay.apps.build import facts_of_run
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.checkpoint import save_model
from detrelay.core.evaluation.coco_ap import CocoResult
from detrelay.core.hub.folder import CheckedFolder, complete_folder
from detrelay.core.recipes.recipe import DataConfig, Recipe, override
from factories import SMALL_HEADS, small_config, small_head_config
from hub_server import WRITE_TOKEN, HubServer

from detrelay.heads import HEADS  # isort: skip

NAMES = ["circle", "triangle", "ring", "cross | x"]
IMAGE = Image.effect_noise((96, 64), 80).convert("RGB")


def small_model(seed: int = 0) -> DetectorForObjectDetection:
    """A StageInteractor with four named classes."""
    torch.manual_seed(seed)
    names = dict(enumerate(NAMES))
    config = small_config(
        id2label=names,
        label2id={name: index for index, name in names.items()},
        category_ids=[7, 3, 90, 11],
    )
    return HEADS["stageinteractor"].model(config).eval()


def write_run(folder: Path, model: DetectorForObjectDetection) -> Path:
    """What a run leaves behind, as far as publishing reads it; its best model."""
    stats = {"AP": 0.4321, "AP50": 0.6, "AP_large": -1.0, "AR_100": 0.55}
    by_class = dict(zip(NAMES, [0.5, 0.4, -1.0, 0.25], strict=True))
    measured = {"epoch": 3, "step": 60, **CocoResult(stats, by_class, 100).to_dict()}
    data = DataConfig(train_annotations="cells/train.json", val_annotations="cells/val.json")
    recipe = override(Recipe(data=data), ["train.seed=5"])
    record = facts_of_run(recipe, None, "apps/train.py --data cells")
    (folder / "pictures").mkdir(parents=True)
    IMAGE.save(folder / "pictures" / "epoch_3.png")
    lines = [{"kind": "train", "step": s, "images_per_second": s / 2} for s in (2, 4, 60)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    processor = DetrelayImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    save_model(model, processor, {**record, "measured": measured}, folder / "best")
    return folder / "best"


def save_small_head(case: str, folder: Path, dtype: torch.dtype, **changes: object) -> Path:
    """A model folder with any head of `SMALL_HEADS` and four classes of drawn shapes."""
    names = dict(enumerate(["circle", "triangle", "ring", "cross"]))
    torch.manual_seed(0)
    config = small_head_config(
        case, id2label=names, category_ids=[1, 2, 3, 4], d_model=64, **changes
    )
    HEADS[SMALL_HEADS[case][0]].model(config).to(dtype).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 64, "longest_edge": 96}, "pad_size_divisor": 16}
    DetrelayImageProcessor(**settings).save_pretrained(folder)
    return folder


@contextmanager
def only_hub(server: HubServer, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """Point this process, whose clients read their settings at import, at the Hub of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr("transformers.utils.hub._hf_api", None)
        patch.setenv("HF_TOKEN", WRITE_TOKEN)
        huggingface_hub.utils.disable_progress_bars()
        try:
            yield patch
        finally:
            huggingface_hub.close_session()
            huggingface_hub.utils.enable_progress_bars()


def environment(server: HubServer, home: Path, **changes: str) -> dict[str, str]:
    """For a fresh process with an empty cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGG"))}
    return {
        **kept,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": WRITE_TOKEN,
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def complete(folder: Path, name: str = "complete") -> CheckedFolder:
    """The folder as uploaded, next to it."""
    return complete_folder(folder, folder.parent / name, "tess/shapes", "apache-2.0")


def card_of(folder: Path) -> str:
    """The card that is uploaded with the folder."""
    return (complete(folder).folder / "README.md").read_text()


def complete_card(folder: Path, license: str | None = None) -> str:
    """The card under a licence; leaves nothing next to the folder."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = complete_folder(folder, Path(temporary) / "copy", "tess/shapes", license).folder
        return (copy / "README.md").read_text()


def change_facts(folder: Path, **changes: object) -> None:
    """Overwrite facts of the training."""
    facts = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps({**facts, **changes}))
