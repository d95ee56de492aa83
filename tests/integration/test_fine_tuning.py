"""Saved models as the commands take them: in half precision, from the Hub, onto other data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detrelay.apps.evaluate import Arguments as EvaluateArguments
from detrelay.apps.evaluate import evaluate
from detrelay.apps.predict import Arguments as PredictArguments
from detrelay.apps.predict import predict
from detrelay.apps.train import Arguments, train
from detrelay.core.hub.publish import publish
from factories_data import write_shapes
from hub_model import only_hub, save_small_head, small_model, write_run
from hub_server import USER, running_hub
from tiny_run import shrink_backbone, skip_pictures

SHORT = ("train.epochs=1", "data.num_workers=0", "train.batch_size=4")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder)
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
    folder = save_small_head(case, tmp_path / "half", dtype)
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
