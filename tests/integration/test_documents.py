"""The programs in the documentation run as they stand."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from detrelay.apps.build import build_model, find_recipe
from detrelay.assigners import CrossStageAssigner
from detrelay.core.data.sample import Category
from hub_model import IMAGE, small_model, write_run
from tiny_run import shrink_backbone, skip_pictures, tiny_run

DOCS = Path(__file__).parents[2] / "docs"


def programs(name: str) -> list[str]:
    """The blocks of Python of a page, in order."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_use_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = programs("python.md")
    assert len(blocks) == 3
    assert len([line for line in blocks[0].splitlines() if line]) <= 20
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)
    assert (tmp_path / "runs/notebook/best/model.safetensors").is_file()
    assert (tmp_path / "runs/my_loop/model.safetensors").is_file()
    assert "decoder/0/class" in capsys.readouterr().out


def test_detections_for_supervision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervision = pytest.importorskip("supervision", reason="needs supervision")
    shrink_backbone(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", small_model()).rename(tmp_path / "MODEL")
    IMAGE.save("image.jpg")
    (block,) = programs("images.md")
    assert "threshold=0.3" in block
    names: dict[str, Any] = {}
    # what has learned nothing is sure of nothing
    exec(compile(block.replace("=0.3", "=0.0"), "images.md", "exec"), names)
    detections, result = names["detections"], names["result"]
    assert isinstance(detections, supervision.Detections)
    assert len(detections) == len(result["boxes"]) == 32  # 8 queries, 4 classes
    assert detections.xyxy.tolist() == result["boxes"].tolist()
    assert detections.class_id.tolist() == result["labels"].tolist()
    known = names["model"].config.id2label
    assert list(detections["class_name"]) == [known[i] for i in result["labels"].tolist()]
    with Image.open("drawn.png") as drawn:
        assert ImageChops.difference(drawn, names["image"]).getbbox() is not None


class Planted:
    """An exported detector that finds one ring in every image, as large as the image."""

    class_names = ("circle", "ring")

    def __init__(self, folder: str, threads: int) -> None:
        self.batches: list[int] = []

    def __call__(self, images: list[Any], threshold: float) -> list[dict[str, Any]]:
        self.batches.append(len(images))
        return [
            {
                "labels": np.array([1]),
                "scores": np.array([0.75], dtype=np.float32),
                "boxes": np.array([[0, 0, image.shape[1], image.shape[0]]], dtype=np.float32),
            }
            for image in images
        ]


def test_a_server_of_others_takes_an_exported_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of the page, step by step as LitServe calls it."""
    pytest.importorskip("litserve", reason="needs litserve")
    monkeypatch.setattr("detrelay.core.export.detector.ExportedDetector", Planted)
    names: dict[str, Any] = {"__name__": "serve_litserve"}
    exec(compile(files("serving.md")["serve_litserve.py"], "serving.md", "exec"), names)
    api = names["DetectorAPI"](max_batch_size=8, batch_timeout=0.02)
    api.setup("cpu")
    requests = []
    for size in ((40, 30), (20, 50)):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        requests.append({"image": base64.b64encode(buffer.getvalue()).decode()})
    images = api.batch([api.decode_request(request) for request in requests])
    answers = [api.encode_response(found) for found in api.unbatch(api.predict(images))]
    assert api.detector.batches == [2]
    assert answers == [
        [{"label": "ring", "score": 0.75, "box": [0, 0, 40, 30]}],
        [{"label": "ring", "score": 0.75, "box": [0, 0, 20, 50]}],
    ]
    for bad in ({}, {"image": "eHg="}, {"image": "?"}):
        with pytest.raises(Exception, match="no image") as refused:
            api.decode_request(bad)
        assert refused.value.status_code == 400  # type: ignore[attr-defined]


def files(name: str) -> dict[str, str]:
    """The blocks of a page that have a title, by title."""
    text = (DOCS / name).read_text(encoding="utf-8")
    found = re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```', text, flags=re.DOTALL | re.MULTILINE)
    return dict(found)


def as_settings(table: dict[str, Any], prefix: str = "") -> list[str]:
    """A recipe's tables as --set takes them; options of parts stay tables."""
    settings = []
    for key, value in table.items():
        if isinstance(value, dict) and not prefix:
            settings += as_settings(value, f"{key}.")
        else:
            settings.append(f"{prefix}{key}={_toml(value)}")
    return settings


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of docs/extending.md in the working folder."""
    found = files("extending.md")
    for name, content in found.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in found:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return found


def test_parts_of_ones_own_train_together(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_pictures(monkeypatch)
    for name, content in parts.items():
        if name.endswith(".py"):
            assert len([line for line in content.splitlines() if line]) <= 20, name
    settings = [
        setting
        for name, content in parts.items()
        if name.endswith(".toml")
        for setting in as_settings(tomllib.loads(content))
    ]
    assert len(settings) == 6
    assert tiny_run(tmp_path / "run", "train.epochs=1", *settings) == 0
    best = json.loads((tmp_path / "run/best/training.json").read_text())
    assert list(best["measured"]["stats"]) == ["AP50", "share_sure"]
    config = json.loads((tmp_path / "run/best/config.json").read_text())
    assert config["backbone_name"] == "my_backbone:Steps"
    assert best["recipe"]["data"]["transforms"][2] == {
        "name": "my_transform:Grey",
        "probability": 0.5,
    }


@pytest.mark.usefixtures("parts")
def test_a_head_of_ones_own_learns_by_its_own_losses() -> None:
    sizes = ("d_model=32", "num_queries=4", "encoder_layers=1", "decoder_layers=2", "ffn_dim=32")
    recipe = find_recipe(
        None,
        *(f"model.{size}" for size in sizes),
        "train.backbone_weights=none",
        "model.backbone_name=my_backbone:Steps",
        "model.backbone_options={width=8}",
        "model.num_backbone_levels=2",
        head="my_head:RefinedConfig",
    )
    model = build_model(recipe, [Category(1, "cell"), Category(2, "dust")])
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}]
    output = model.train()(torch.randn(1, 3, 160, 160), labels=labels)
    criterion: Any = model.loss_function
    assert isinstance(criterion.assigners["decoder"], CrossStageAssigner)
    weights = {"class": 2.0, "l1": 5.0, "giou": 4.0}
    total = sum(weights[key.split("/")[2]] * loss for key, loss in output.loss_dict.items())
    torch.testing.assert_close(output.loss, total)
