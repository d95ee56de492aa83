"""Saved models as the commands take them: in half precision, from the Hub, onto other data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detrelay.apps.evaluate import Arguments as EvaluateArguments
from detrelay.apps.evaluate import evaluate
from detrelay.apps.predict import Arguments as PredictArguments
from detrelay.apps.predict import predict
from detrelay.apps.train import Arguments, resolve, train
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.hub.publish import publish
from detrelay.heads import HEADS
from factories import SMALL_HEADS, small_head_config
from factories_data import write_shapes
from hub_model import only_hub, small_model, write_run
from hub_server import USER, running_hub
from tiny_run import shrink_backbone, skip_pictures

SHORT = ("train.epochs=1", "data.num_workers=0", "train.batch_size=4")
NAMES = dict(enumerate(["circle", "triangle", "ring", "cross"]))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder)
    return folder


def save(case: str, folder: Path, dtype: torch.dtype, **changes: object) -> Path:
    torch.manual_seed(0)
    config = small_head_config(
        case, id2label=NAMES, category_ids=[1, 2, 3, 4], d_model=64, **changes
    )
    HEADS[SMALL_HEADS[case][0]].model(config).to(dtype).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 64, "longest_edge": 96}, "pad_size_divisor": 16}
    DetrelayImageProcessor(**settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param("dino", torch.bfloat16, marks=pytest.mark.slow),
        ("stageinteractor", torch.float16),
    ],
)
def test_a_model_in_half_precision_works_in_every_command(
    case: str, dtype: torch.dtype, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(case, tmp_path / "half", dtype)
    truth = data / "val.json"
    assert evaluate(EvaluateArguments(model=folder, data=truth, output=tmp_path / "ap.json")) == 0
    assert 0 <= json.loads((tmp_path / "ap.json").read_text())["stats"]["AP"] <= 1
    photos = str(data / "images" / "val_*.png")
    found = PredictArguments(model=folder, input=photos, output=tmp_path / "out", threshold=0.0)
    assert predict(found) == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert train(Arguments(init=folder, data=(data,), output=tmp_path / "run", set=(SHORT,))) == 0
    assert "all weights are kept" in capsys.readouterr().out
    trained = load_file(tmp_path / "run" / "best" / "model.safetensors")
    kinds = {value.dtype for value in trained.values() if value.is_floating_point()}
    assert kinds == {torch.float32}


def test_settings_sizes_and_padding_are_those_of_the_model(data: Path, tmp_path: Path) -> None:
    folder = save("dn_detr", tmp_path / "saved", torch.float32, denoising_groups=None)
    recipe = resolve(Arguments(init=folder, data=(data,), set=(("model.num_queries=5",),)))
    assert recipe.head == "dn_detr"
    assert recipe.model["num_queries"] == 5
    assert recipe.model["d_model"] == 64
    assert recipe.model["denoising_groups"] is None  # which is not the default
    assert "category_ids" not in recipe.model
    sides = (recipe.data.short_sides, recipe.data.max_size, recipe.data.pad_size_divisor)
    assert sides == ((64,), 96, 16)
    assert (recipe.train.schedule, recipe.train.warmup_share) == ("cosine", 0.05)
    named = resolve(Arguments("dn_detr_r50_12e", init=folder))
    assert named.model["d_model"] == 64
    assert (named.data.eval_short_side, named.train.epochs) == (800, 12)


def refusals(folder: Path) -> Iterator[tuple[Arguments, str]]:
    yield Arguments("dino_r50_4scale_12e", init=folder), "is a dn_detr, but --recipe dino"
    yield Arguments(init=folder, head="dino"), "its head is dn_detr; omit --head dino"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "detr"}))
    yield Arguments(init=folder), "holds a 'detr'; expected one of the heads deformable_detr"
    (folder / "config.json").write_text("[]")
    yield Arguments(init=folder), "is not the config of a model"


def test_what_cannot_be_fine_tuned_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save("dn_detr", tmp_path / "saved", torch.float32)
    other = DetrelayImageProcessor(image_mean=[0.5, 0.5, 0.5])
    other.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"image_mean \(0.5, 0.5, 0.5\); training a resnet18 supports"
    ):
        resolve(Arguments(init=folder))
    DetrelayImageProcessor().save_pretrained(folder)
    for arguments, message in refusals(folder):
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            resolve(arguments)
        assert len(str(refused.value).splitlines()) == 1


def test_a_model_of_the_hub_is_fine_tuned(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = write_run(tmp_path / "theirs", small_model())
    with running_hub() as server, only_hub(server, tmp_path / "home"):
        publish(best, f"{USER}/MODEL", private=False)
        arguments = Arguments(
            init=Path(f"{USER}/MODEL"), data=(data,), output=tmp_path / "run", set=(SHORT,)
        )
        assert train(arguments) == 0
    printed = capsys.readouterr().out
    assert "class scores kept: circle, triangle, ring\n" in printed
    assert "class scores new:  cross\n" in printed
