"""Options of a run: each one does what it says, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import detrelay.apps.train as train_app
from detrelay.assigners import build_assigners
from detrelay.core.criterion import Criterion
from detrelay.core.detector.checkpointing import checkpoint_activations
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine import memory
from detrelay.core.engine.ema import average_of
from detrelay.core.engine.logging import MetricsLog, read_metrics
from detrelay.core.engine.memory import Fit, find_fitting_batch
from detrelay.core.engine.scaling import describe_step, with_scaled_rate
from detrelay.core.engine.update import Update, assignment_counts
from detrelay.core.errors import RecipeError
from detrelay.core.recipes.recipe import TrainConfig
from detrelay.core.structures import Assignment, Pairs
from detrelay.heads import HEADS
from factories import SMALL_HEADS, make_targets, small_head_config
from tiny_run import final_weights, shrink_backbone, skip_pictures, tiny_run


@pytest.fixture(autouse=True)
def small_and_silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shrink_backbone(monkeypatch)
    skip_pictures(monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(threads)


def make_head(case: str, **changes: Any) -> tuple[DetectorForObjectDetection, Criterion]:
    torch.manual_seed(0)
    entry = HEADS[SMALL_HEADS[case][0]]
    model = entry.model(small_head_config(case, **changes)).train()
    losses = entry.model.loss_config
    return model, Criterion(losses.terms(), build_assigners(entry.assigner, losses))


def test_the_average_follows_weights_and_buffers_from_before_the_first_step() -> None:
    model, _ = make_head("stageinteractor")
    average = average_of(model, 0.75)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.add_(1)
    average.update_parameters(model)
    average.update_parameters(model)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = 0.75**2 * before[key] + (1 - 0.75**2) * (before[key] + 1)
            torch.testing.assert_close(value, expected)
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_the_average_is_evaluated_published_and_kept(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "plain", "train.epochs=1") == 0
    assert tiny_run(tmp_path / "run", "train.epochs=1", "train.ema_decay=0.5") == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_0000003")
    trained = load_file(checkpoint / "model.safetensors")
    published = final_weights(tmp_path / "run")
    averaged = load_file(checkpoint / "model_1.safetensors")
    plain = final_weights(tmp_path / "plain")
    for key, value in plain.items():
        assert torch.equal(trained[key], value)  # training itself does not notice
        assert torch.equal(averaged[key], published[key])
    assert any(not torch.equal(published[key], plain[key]) for key in plain)


@pytest.mark.parametrize("case", sorted(SMALL_HEADS))
def test_checkpointed_activations_change_no_loss_and_no_gradient(case: str) -> None:
    model, criterion = make_head(case)
    targets = make_targets((3, 0))
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))

    def step(model: DetectorForObjectDetection) -> tuple[dict[str, Any], list[Any], int]:
        kept: list[int] = []
        torch.manual_seed(1)  # the noise of denoising
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: (kept.append(x.numel()), x)[1], lambda x: x
        )
        with hooks:
            result = criterion(model(pixel_values=pixels, targets=targets).groups, targets)
        result.total.backward()
        return result.losses, [p.grad for p in model.parameters()], sum(kept)

    saving = copy.deepcopy(model)
    checkpoint_activations(saving)
    losses, gradients, size = step(model)
    others, other_gradients, less = step(saving)
    assert less < size
    for key, loss in losses.items():
        assert torch.equal(others[key], loss), key
    for first, second in zip(gradients, other_gradients, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(second, first, rtol=1e-6, atol=1e-7)


def test_blocks_that_learn_statistics_are_not_run_twice() -> None:
    class BasicBlock(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    model, _ = make_head("deformable_detr")
    model.backbone.add_module("learning", BasicBlock())
    model.backbone.add_module("fixed", BasicBlock().requires_grad_(False))
    model.backbone.fixed.norm.track_running_stats = False
    checkpoint_activations(model)
    assert "forward" not in vars(model.backbone.learning)
    assert "forward" in vars(model.backbone.fixed)


def test_a_run_that_saves_memory_logs_the_losses_of_one_that_does_not(tmp_path: Path) -> None:
    for name, setting in (("plain", "false"), ("saving", "true")):
        settings = ("train.epochs=1", f"train.activation_checkpointing={setting}")
        assert tiny_run(tmp_path / name, *settings) == 0
    plain, saving = (
        [line.get("loss") for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("plain", "saving")
    )
    assert saving == pytest.approx(plain, rel=1e-4) if None not in plain else plain[:3]


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


@pytest.mark.parametrize(("fitting", "expected"), [(6, (6, 1)), (5, (3, 2)), (1, (1, 6))])
def test_the_largest_batch_that_fits_keeps_the_images_of_a_step(
    fitting: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, criterion = make_head("deformable_detr")
    forward = DetectorForObjectDetection.forward

    def short_of_memory(self: Any, pixel_values: torch.Tensor, **options: Any) -> Any:
        if len(pixel_values) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(DetectorForObjectDetection, "forward", short_of_memory)
    monkeypatch.setattr(memory, "_OBJECTS_PER_IMAGE", 2)
    before = copy.deepcopy(model.state_dict())
    settings = TrainConfig(batch_size=3, accumulation_steps=2)
    fit = find_fitting_batch(Accelerator(), model, criterion, settings, side=128)
    assert fit == Fit(*expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_image_that_never_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(memory, "_try_step", never)
    model, criterion = make_head("deformable_detr")
    with pytest.raises(ValueError, match="not even one image of 64 x 64 pixels fits"):
        find_fitting_batch(Accelerator(), model, criterion, TrainConfig(), side=64)


def test_a_run_uses_the_batch_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = []

    def try_step(*arguments: Any) -> int:
        *_, side, size = arguments
        sides.append(side)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size

    monkeypatch.setattr(memory, "_try_step", try_step)
    assert tiny_run(tmp_path / "run", "train.epochs=1", find_batch_size=True) == 0
    assert "fits into memory: train.batch_size=2 train.accumulation_steps=2" in (
        capsys.readouterr().out
    )
    recipe = train_app.stored_recipe(tmp_path / "run")
    assert (recipe.train.batch_size, recipe.train.accumulation_steps) == (2, 2)
    assert set(sides) == {64}


def test_learning_rates_for_other_batches() -> None:
    settings = TrainConfig(
        batch_size=2, accumulation_steps=2, learning_rate=1e-4, published_batch_size=16
    )
    line = describe_step(settings, 1)
    assert "step: 4 images (1 process(es) x 2 images x 2 pass(es)), learning rate 0.0001" in line
    assert "published: 16 images, learning rate 0.0001" in line
    assert "linear makes it 2.5e-05, sqrt 5e-05" in line
    assert "linear makes" not in describe_step(replace(settings, batch_size=8), 1)
    for rule, expected in (("none", 1e-4), ("linear", 2.5e-5), ("sqrt", 5e-5)):
        scaled = with_scaled_rate(replace(settings, scale_learning_rate=rule), 4)
        assert scaled.learning_rate == pytest.approx(expected)
    other = replace(settings, scale_learning_rate="linear", published_batch_size=8)
    assert with_scaled_rate(other, 4).learning_rate == pytest.approx(5e-5)
    unpublished = replace(other, published_batch_size=None)
    assert "published" not in describe_step(replace(unpublished, scale_learning_rate="none"), 1)
    with pytest.raises(ValueError, match=r"needs train\.published_batch_size"):
        with_scaled_rate(unpublished, 4)


def test_the_scaled_rate_is_the_one_that_trains(tmp_path: Path) -> None:
    settings = (
        *("train.epochs=1", "train.warmup_steps=0"),
        *("train.scale_learning_rate=linear", "train.published_batch_size=16"),
    )
    assert tiny_run(tmp_path / "run", *settings) == 0
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert line["learning_rate"] == pytest.approx(1e-3 * 4 / 16)


def test_a_run_stops_early_when_nothing_gets_better(tmp_path: Path) -> None:
    settings = ["train.epochs=6", "train.learning_rate=0", "train.early_stopping_patience=2"]
    assert tiny_run(tmp_path / "run", *settings) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # the first evaluation is the best, the next two are not better
    assert [line["epoch"] for line in lines if line["kind"] == "evaluation"] == [1, 2, 3]
    assert (tmp_path / "run" / "last").is_dir()
    assert tiny_run(tmp_path / "run", *settings, resume=True) == 0  # and stays stopped
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == lines


def pairs(*rows: tuple[int, int]) -> Pairs:
    query, target = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Pairs(torch.zeros_like(query), query, target)


def test_matches_and_moved_labels_are_counted_stage_by_stage() -> None:
    own = pairs((0, 0), (3, 1))
    lent = Assignment(classes=pairs((3, 1), (5, 0), (6, 1)), boxes=own)
    plain = Assignment(classes=own, boxes=own)
    assignments = {"decoder": (plain, lent), "denoising": (plain,)}
    update = Update(torch.tensor(0.0), {}, torch.tensor(0.0), [assignments, assignments])
    tags, counts = assignment_counts(update, {"decoder", "proposals"})
    assert tags == ["decoder/0", "decoder/1"]
    assert counts.tolist() == [[4, 4, 0], [4, 6, 4]]


def test_the_log_holds_matches_moved_labels_and_memory(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "run", "train.epochs=1", "assigner.options.iou_threshold=0") == 0
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    stages = [f"decoder/{index}" for index in range(3)]
    assert list(line["matches_per_image"]) == list(line["moved_labels_share"]) == stages
    assert all(1 <= value <= 8 for value in line["matches_per_image"].values())
    # nothing is out of reach at threshold 0, so other stages lend
    assert 0 < line["moved_labels_share"]["decoder/0"] < 1
    assert line["peak_memory_mib"] > 10


def test_trackers_get_the_numbers_of_the_log(tmp_path: Path) -> None:
    told: list[tuple[dict[str, float], int]] = []
    log = MetricsLog(
        tmp_path / "metrics.jsonl", forward=lambda values, step: told.append((values, step))
    )
    log.write("train", 3, {"loss": 2.5, "losses": {"decoder/0/l1": 0.5}, "note": "a", "x": None})
    log.write("evaluation", 3, {"AP": 0.25, "AP75": float("nan")})
    assert told == [
        ({"train/loss": 2.5, "train/losses/decoder/0/l1": 0.5}, 3),
        ({"evaluation/AP": 0.25}, 3),
    ]


def test_a_tracker_that_is_missing_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(RecipeError, match="wandb is not installed; pip install wandb"):
        train_app.check_trackers(("wandb",))
    with pytest.raises(RecipeError, match="unknown tracker tensorbord; did you mean tensorboard"):
        train_app.check_trackers(("tensorbord",))


def test_a_tracker_that_cannot_start_leaves_no_run_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no key\nlog in")

    monkeypatch.setattr(train_app, "check_trackers", lambda names: None)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    with pytest.raises(RecipeError, match=r"trackers=wandb: cannot start \(no key log in\)"):
        tiny_run(tmp_path / "run", 'train.trackers=["wandb"]')
    assert not (tmp_path / "run").exists()


def test_tensorboard_files(tmp_path: Path) -> None:
    assert tiny_run(tmp_path / "run", "train.epochs=1", 'train.trackers=["tensorboard"]') == 0
    assert list((tmp_path / "run").glob("detrelay/events.out.*"))
