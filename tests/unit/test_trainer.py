"""Parts of the loop: order of the data, random state, signals, the log, non-finite values."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from detrelay.apps.replay import Arguments as Replay
from detrelay.apps.replay import replay
from detrelay.core.criterion import Criterion
from detrelay.core.data.geometry import resized_shape
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.data.transforms import VisitSampler
from detrelay.core.engine.failure import load_failure
from detrelay.core.engine.loaders import make_loader
from detrelay.core.engine.logging import MetricsLog, Progress, read_metrics
from detrelay.core.engine.trainer import StopSignals
from tiny_run import shrink_backbone, skip_pictures, tiny_run


class Visits(Dataset[dict[str, object]]):
    """Each item tells the visit it was asked for."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, visit: int) -> dict[str, object]:
        return {
            "pixel_values": torch.zeros(3, 32, 32),
            "labels": {"image_id": torch.tensor([visit])},
        }


def visits(loader: object) -> list[int]:
    return [int(label["image_id"]) for batch in loader for label in batch["labels"]]


def expected_visits(epoch: int) -> list[int]:
    sampler = VisitSampler(7, seed=3)
    sampler.set_epoch(epoch)
    return list(sampler)[:6]  # three batches of two; the seventh image does not fill one


@pytest.mark.parametrize("num_workers", [0, 1])
def test_accelerate_leaves_the_order_of_visits_alone(num_workers: int) -> None:
    accelerator = Accelerator()
    sampler = VisitSampler(7, seed=3)
    loader = accelerator.prepare(
        make_loader(Visits(), sampler, 2, num_workers=num_workers, drop_last=True)
    )
    # out of order and twice, as a resumed run may ask
    for epoch in (4, 0, 1, 1):
        sampler.set_epoch(epoch)
        loader.set_epoch(epoch)
        assert visits(loader) == expected_visits(epoch)
    sampler.set_epoch(5)
    loader.set_epoch(5)
    assert visits(accelerator.skip_first_batches(loader, 2)) == expected_visits(5)[4:]


def test_loading_takes_nothing_from_the_global_random_state() -> None:
    loader = Accelerator().prepare(make_loader(Visits(), VisitSampler(7, seed=3), 2))
    before = torch.get_rng_state()
    visits(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stop_signal_is_remembered_and_the_next_one_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_workers_outlive_signals_to_the_group() -> None:
    loader = make_loader(Visits(), VisitSampler(7, seed=3, shuffle=False), 1, num_workers=1)
    seen = []
    for batch in loader:
        seen += [int(label["image_id"]) for label in batch["labels"]]
        for worker in loader._iterator._workers:
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
    assert seen == list(range(7))


def test_workers_do_not_outlive_what_fails(tmp_path: Path) -> None:
    # neither a process of multiprocessing nor the program itself, which ends in other ways; a
    # worker that would live on kills whom it would keep waiting for ever, so that no clock is asked
    script = tmp_path / "fails.py"
    script.write_text(
        "import multiprocessing, os, signal\n"
        "import detrelay.core.engine.loaders as loaders\n"
        "from detrelay.core.data.transforms import VisitSampler\n"
        "loaders.collate = lambda items, divisor: items\n"
        "original = loaders._outlive_signals\n"
        "def watched(*arguments):\n"
        "    original(*arguments)\n"
        "    handler = signal.getsignal(signal.SIGTERM)\n"
        "    def end(*received):\n"
        "        handler(*received)\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "        os._exit(1)\n"
        "    signal.signal(signal.SIGTERM, end)\n"
        "loaders._outlive_signals = watched\n"
        "def fail(code):\n"
        "    global batches\n"
        "    sampler = VisitSampler(3, seed=0, shuffle=False)\n"
        "    batches = iter(loaders.make_loader([7, 8, 9], sampler, 1, num_workers=1))\n"
        "    next(batches)\n"
        "    raise SystemExit(code)\n"
        "child = multiprocessing.get_context('fork').Process(target=fail, args=[5])\n"
        "child.start()\n"
        "child.join()\n"
        "fail(child.exitcode + 1)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], check=False)
    assert ended.returncode == 6


def test_the_log_rewinds_to_before_the_evaluation_of_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for kind, step in [("train", 1), ("train", 2), ("evaluation", 2), ("train", 3)]:
        log.write(kind, step, {"loss": float("nan")})
    with log.path.open("a") as file:
        file.write('{"kind": "tr')
    log.rewind(2)
    lines = read_metrics(log.path)
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2)]
    assert lines[0]["loss"] is None  # NaN is no JSON
    assert log.path.read_text().endswith("\n")


def test_a_log_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"ki\n{"kind": "train", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(path)


def test_time_left_counts_the_steps_of_this_start_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 60.0, 60.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress(total=110, done=100)
    progress.advance()
    progress.report(3, {"loss": 1.0})
    assert capsys.readouterr().out == "step 101/110  epoch 3  loss 1  time left 9:00\n"


@pytest.fixture
def small_and_silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)
    yield
    torch.set_num_threads(threads)


def test_diverging_training_ends_in_one_line_and_keeps_the_checkpoint(
    small_and_silent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every=1"]
    assert tiny_run(tmp_path / "run", *settings) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: non-finite ")
    assert "in step 2, whose batch holds the image ids [" in line
    assert "last checkpoint is kept" in line
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    file = Path(line.partition("detrelay replay --file ")[2])
    capsys.readouterr()
    assert replay(Replay(file)) == 1
    then, now = capsys.readouterr().out.strip().splitlines()
    # the same losses, in the same stage, of the same images
    assert then.endswith(f"then: {now.removeprefix('now: ')}")
    facts = json.loads(file.with_suffix(".json").read_text())
    assert (facts["step"], facts["progress"]) == (2, 1 / 6)


def test_a_failure_that_went_away_and_files_that_are_none(
    small_and_silent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.accumulation_steps=2"]
    assert tiny_run(tmp_path / "run", *settings, "train.batch_size=2") == 1
    (file,) = (tmp_path / "run").glob("failures/*/process_0.safetensors")
    batches, _ = load_failure(file)
    assert [len(batch["labels"]) for batch in batches] == [2, 2]
    weights = load_file(file.parent / "model.safetensors")
    save_file(
        {key: torch.zeros_like(value) for key, value in weights.items()},
        file.parent / "model.safetensors",
        {"format": "pt"},
    )
    capsys.readouterr()
    assert replay(Replay(file)) == 0
    assert "every loss and gradient is finite" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model\.safetensors: not the batches of a failed step"):
        load_failure(file.parent / "model.safetensors")
    with pytest.raises(ValueError, match="no such file; expected the batches that training saved"):
        replay(Replay(tmp_path / "none"))


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
