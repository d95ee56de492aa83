"""The loop: the options of a run, what it saves, and non-finite values."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from detrelay.core.criterion import Criterion
from detrelay.core.data.geometry import resized_shape
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import VisitSampler
from detrelay.core.engine.logging import read_metrics
from tiny_run import tiny_run

pytestmark = pytest.mark.usefixtures("small_and_silent")


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(
    small_and_silent: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = []

    def clip(self: Accelerator, parameters: object, limit: float) -> torch.Tensor:
        limits.append(limit)
        return torch.tensor(float("inf") if len(limits) == 2 else 1.0)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    assert tiny_run(tmp_path / "run", "train.clip_norm=0.5") == 1
    assert "error: non-finite gradient; in step 2, whose batch" in capsys.readouterr().err
    assert limits == [0.5, 0.5]


def test_no_clipping(
    small_and_silent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = set()

    def clip(self: Accelerator, parameters: object, limit: float) -> torch.Tensor:
        limits.add(limit)
        return torch.tensor(1.0)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    assert tiny_run(tmp_path / "run", "train.clip_norm=0", "train.epochs=1") == 0
    assert limits == {float("inf")}


def test_bf16_changes_the_losses_a_little(small_and_silent: None, tmp_path: Path) -> None:
    losses = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()  # one precision a process otherwise
        output = tmp_path / precision
        settings = ["train.epochs=1", f"train.mixed_precision={precision}"]
        assert tiny_run(output, *settings) == 0
        losses[precision] = read_metrics(output / "metrics.jsonl")[0]["loss"]
    AcceleratorState._reset_state()
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)
    assert losses["bf16"] != losses["no"]


@pytest.mark.slow
def test_two_hundred_steps_in_bf16_stay_near_those_in_float32(
    small_and_silent: None, tmp_path: Path
) -> None:
    """The loss, averaged over 20 steps, stays within 5 %."""
    averages = {}
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()
        output = tmp_path / precision
        rare = ("train.epochs=67", "train.evaluate_every=67", "train.checkpoint_every=1000")
        assert tiny_run(output, *rare, f"train.mixed_precision={precision}") == 0
        lines = [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]
        losses = torch.tensor([line["loss"] for line in lines[:200]])
        averages[precision] = losses.reshape(10, 20).mean(1)
    AcceleratorState._reset_state()
    torch.testing.assert_close(averages["bf16"], averages["no"], rtol=0.05, atol=0)
    assert averages["no"][-1] < 0.8 * averages["no"][0]  # something was learnt


def test_evaluations_and_checkpoints_come_as_often_as_asked(
    small_and_silent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shares = []
    plan = Criterion.plan

    def watched(self: Criterion, *arguments: Any) -> Any:
        shares.append(self.progress.share)
        return plan(self, *arguments)

    monkeypatch.setattr(Criterion, "plan", watched)
    settings = ["train.epochs=3", "train.evaluate_every=2", "train.keep_checkpoints=1"]
    settings += ["train.max_detections=7", "train.nms_iou_threshold=0.6"]
    assert tiny_run(output, *settings) == 0
    assert shares == [step / 9 for step in range(9)]
    saved = json.loads((output / "best" / "preprocessor_config.json").read_text())
    assert saved["nms_iou_threshold"] == 0.6
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["epoch"] for line in lines if line["kind"] == "evaluation"] == [2, 3]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_0000009"]
    assert json.loads((output / "results.json").read_text())["max_detections"] == 7


def test_a_logged_step_holds_the_named_figures(small_and_silent: None, tmp_path: Path) -> None:
    settings = ["train.epochs=1", "train.log_every=2", "loss.giou_weight=0", "data.num_workers=1"]
    assert tiny_run(tmp_path / "run", *settings) == 0
    step, evaluation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (step["kind"], step["step"], step["epoch"]) == ("train", 2, 1)
    losses = step["losses"]
    assert list(losses) == [
        f"decoder/{stage}/{term}" for stage in range(3) for term in ("class", "l1", "giou")
    ]
    weights = {"class": 2.0, "l1": 5.0, "giou": 0.0}
    total = sum(weights[key.split("/")[2]] * value for key, value in losses.items())
    assert step["loss"] == pytest.approx(total, rel=1e-5)
    # second of two steps of warm-up
    assert step["learning_rate"] == pytest.approx(1e-3 * (1 - 0.5 * 0.999))
    assert step["gradient_norm"] > 0
    assert 0 <= step["data_wait_share"] <= 1
    images = list(VisitSampler(14, seed=0))[4:8]
    sizes = ShapesDataset(14, image_size=64, seed=0).sizes[images].tolist()
    areas = [prod(resized_shape(height, width, 64, 64)) for height, width in sizes]
    assert step["real_pixel_share"] == pytest.approx(sum(areas) / (4 * 64 * 64))
    assert evaluation["kind"] == "evaluation"
    assert set(evaluation) > {"AP", "AP50", "AR_100"}


def test_best_model_is_the_best_evaluation(small_and_silent: None, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert tiny_run(output, "train.epochs=3", "train.learning_rate=1e-9") == 0
    scores = [
        (line["AP"], line["step"])
        for line in read_metrics(output / "metrics.jsonl")
        if line["kind"] == "evaluation"
    ]
    measured = json.loads((output / "best" / "training.json").read_text())["measured"]
    first_best = max(scores, key=lambda pair: (pair[0], -pair[1]))
    assert (measured["stats"]["AP"], measured["step"]) == first_best


def test_too_few_images_for_a_step(small_and_silent: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one step takes 99 images, but there are 14 to train on"):
        tiny_run(tmp_path / "run", "train.batch_size=99")
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_the_model_is_compiled_and_the_criterion_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_module(self: torch.nn.Module, **options: Any) -> None:
        compiled.append((type(self).__name__, options))

    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    assert tiny_run(tmp_path / "plain", "train.epochs=1") == 0
    assert compiled == []
    assert tiny_run(tmp_path / "run", "train.epochs=1", "train.compile=true") == 0
    assert compiled == [("StageInteractorForObjectDetection", {"dynamic": True})]


def test_a_run_stops_early_when_nothing_gets_better(tmp_path: Path) -> None:
    settings = ["train.epochs=6", "train.learning_rate=0", "train.early_stopping_patience=2"]
    assert tiny_run(tmp_path / "run", *settings) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # the first evaluation is the best, the next two are not better
    assert [line["epoch"] for line in lines if line["kind"] == "evaluation"] == [1, 2, 3]
    assert (tmp_path / "run" / "last").is_dir()
    assert tiny_run(tmp_path / "run", *settings, resume=True) == 0  # and stays stopped
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == lines
