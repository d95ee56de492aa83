"""A stopped and resumed run must equal the uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detrelay.apps.train import Arguments, train
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.engine import atomic_folder, run_folder
from detrelay.core.engine.checkpoint import find_damage
from detrelay.core.engine.faults import RunFault
from detrelay.core.engine.logging import read_metrics
from detrelay.core.engine.parts import Evaluation
from detrelay.core.engine.run_folder import RunFolderError, checkpoints
from detrelay.core.engine.trainer import Trainer
from tiny_run import (
    final_weights,
    shrink_backbone,
    skip_pictures,
    tiny_arguments,
    tiny_run,
)

# measured in each run
CLOCK_KEYS = {"images_per_second", "data_wait_share", "peak_memory_mib"}


EPOCHS = "train.epochs=3"
AVERAGED = "train.ema_decay=0.9"


@pytest.fixture(scope="module", autouse=True)
def small_and_silent() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        skip_pictures(patch)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(small_and_silent: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert tiny_run(output, EPOCHS, AVERAGED) == 0
    return output


def figures(output: Path) -> list[dict[str, object]]:
    lines = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in CLOCK_KEYS} for line in lines]


def assert_same_run(output: Path, reference: Path) -> None:
    weights, expected = final_weights(output), final_weights(reference)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert figures(output) == figures(reference)


def act_before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    original = Trainer._step

    def patched(self: Trainer, batch: object) -> object:
        if self.position.step == step:
            action()
        return original(self, batch)

    monkeypatch.setattr(Trainer, "_step", patched)


def test_log_holds_every_step_and_evaluation_once(uninterrupted: Path) -> None:
    lines = figures(uninterrupted)
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1), ("train", 2), ("train", 3), ("evaluation", 3),
        ("train", 4), ("train", 5), ("train", 6), ("evaluation", 6),
        ("train", 7), ("train", 8), ("train", 9), ("evaluation", 9),
    ]  # fmt: skip


def test_signal_in_the_middle_of_an_epoch(
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        act_before_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert tiny_run(output, EPOCHS, AVERAGED) == 143
    out = capsys.readouterr().out
    assert "SIGTERM after step 5" in out  # the step that was under way is finished
    assert f"--resume --output {output}" in out
    assert train(Arguments(output=output, resume=True)) == 0  # as that line says
    assert_same_run(output, uninterrupted)


def test_signal_during_an_evaluation(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = DetrelayImageProcessor.post_process_object_detection

        def interrupted(*arguments: object, **options: object) -> object:
            os.kill(os.getpid(), signal.SIGINT)
            return original(*arguments, **options)

        patch.setattr(DetrelayImageProcessor, "post_process_object_detection", interrupted)
        assert tiny_run(output, EPOCHS, AVERAGED) == 130
    assert [line["kind"] for line in figures(output)] == ["train"] * 3
    assert tiny_run(output, EPOCHS, AVERAGED, resume=True) == 0
    assert_same_run(output, uninterrupted)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (1, "no checkpoint was saved yet: starting from step 0"),
        (5, "resuming after step 4"),  # step 5 is in the log and must not appear twice
    ],
)
def test_crash_after_lines_that_no_checkpoint_holds(
    step: int,
    message: str,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"

    def crash() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        act_before_step(patch, step, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run(output, EPOCHS, AVERAGED)
    assert read_metrics(output / "metrics.jsonl")[-1]["step"] == step
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut in the middle of a line
    assert tiny_run(output, EPOCHS, AVERAGED, resume=True) == 0
    assert message in capsys.readouterr().out
    assert_same_run(output, uninterrupted)


def test_damaged_checkpoint_falls_back_to_the_one_before(
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        act_before_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny_run(output, EPOCHS, AVERAGED)
    newest = output / "checkpoints" / "step_0000005"
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x00" * 8)
    assert tiny_run(output, EPOCHS, AVERAGED, resume=True) == 0
    out = capsys.readouterr().out
    assert "step_0000005 is damaged (model.safetensors has changed)" in out
    assert "resuming after step 4" in out
    assert_same_run(output, uninterrupted)


def test_more_epochs_on_a_finished_run(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "grown"
    assert tiny_run(output, AVERAGED) == 0
    assert tiny_run(output, EPOCHS, AVERAGED, resume=True) == 0
    assert_same_run(output, uninterrupted)


def stopped_after(step: int, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that a signal stopped, with a checkpoint of that step."""
    with monkeypatch.context() as patch:
        act_before_step(patch, step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert tiny_run(output, EPOCHS, AVERAGED) == 143
    return output


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text("")])
def test_a_lost_record_is_taken_from_a_checkpoint(
    harm: Callable[[Path], object],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = stopped_after(5, tmp_path / "run", monkeypatch)
    before = run_folder.read_record(output)
    harm(output / "training.json")
    assert train(Arguments(output=output, resume=True)) == 0
    assert "taking the copy in the newest checkpoint" in capsys.readouterr().out
    assert run_folder.read_record(output)["recipe"] == before["recipe"]
    assert_same_run(output, uninterrupted)


def test_a_damaged_line_of_the_log_is_counted_and_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = stopped_after(5, tmp_path / "run", monkeypatch)
    log = output / "metrics.jsonl"
    _, *others = log.read_text().splitlines(keepends=True)
    damaged = "\0" * 9 + "\n"
    log.write_text(damaged + "".join(others))
    assert tiny_run(output, EPOCHS, AVERAGED, resume=True) == 0
    assert "left out 1 damaged line(s)" in capsys.readouterr().out
    assert [line["step"] for line in figures(output)][:2] == [2, 3]
    assert (output / "metrics.jsonl.damaged").read_text().startswith(damaged)


def test_a_deleted_best_model_is_reported_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = stopped_after(5, tmp_path / "run", monkeypatch)
    shutil.rmtree(output / "best")
    assert tiny_run(output, EPOCHS, AVERAGED, resume=True) == 0
    assert f"{output / 'best'} is missing or damaged (AP " in capsys.readouterr().out
    measured = run_folder.measured(output / "best")
    assert measured is not None
    assert measured["step"] in (6, 9)


def test_a_best_model_deleted_at_the_end_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model = Trainer._save_model

    def delete_best(self: Trainer, name: str, evaluation: Evaluation) -> None:
        save_model(self, name, evaluation)
        if name == "last":
            shutil.rmtree(self.output / "best")

    monkeypatch.setattr(Trainer, "_save_model", delete_best)
    assert tiny_run(tmp_path / "run", "train.epochs=1") == 0
    assert "best model: none; " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "results.json").read_text())["best"] is None


def test_a_run_killed_before_its_first_checkpoint_begins_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at its start: with those of --init, not with random ones."""
    assert tiny_run(tmp_path / "first", "train.epochs=1") == 0
    init = tmp_path / "first" / "last"
    assert tiny_run(tmp_path / "whole", "train.epochs=1", init=init) == 0

    def crash() -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        act_before_step(patch, 1, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            tiny_run(tmp_path / "cut", "train.epochs=1", init=init)
    assert tiny_run(tmp_path / "cut", "train.epochs=1", resume=True) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_killed_loader_process_is_reported_in_one_line(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    others = set(multiprocessing.active_children())  # of tests before this one

    def kill_the_loader() -> None:
        """The one of training: it has started before that of evaluation."""
        loaders = set(multiprocessing.active_children()) - others
        os.kill(min(loader.pid or 0 for loader in loaders), signal.SIGKILL)

    with monkeypatch.context() as patch:
        act_before_step(patch, 4, kill_the_loader)
        with pytest.raises(RunFault, match="a process that loads images was killed") as caught:
            tiny_run(output, EPOCHS, AVERAGED, "data.num_workers=1")
    assert f"resume with: detrelay train --resume --output {output}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tiny_run(output, EPOCHS, AVERAGED, "data.num_workers=0", resume=True) == 0
    assert_same_run(output, uninterrupted)


def test_a_folder_in_use_is_refused_to_both_kinds_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = stopped_after(2, tmp_path / "run", monkeypatch)
    log = (output / "metrics.jsonl").read_bytes()
    with run_folder.locked(output):
        with pytest.raises(RunFolderError, match="in use by another training"):
            tiny_run(output, EPOCHS, AVERAGED, resume=True)
        with pytest.raises(RunFolderError, match="holds another run"):
            tiny_run(output, EPOCHS, AVERAGED)
    assert (output / "metrics.jsonl").read_bytes() == log
    new = tmp_path / "new"
    with run_folder.locked(new), pytest.raises(RunFolderError, match="in use by another training"):
        tiny_run(new)
    assert not any(new.iterdir())  # not the lock either


KILLED = (
    *("train.epochs=130", "train.evaluate_every=4"),
    *("train.checkpoint_every=2", "train.ema_decay=0.9"),
)


KILLS, KILLS_AT_THE_END = 80, 20


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL leaves no time for anything; weights, average and log must not show it.

    A quarter of the first kills come while a run starts, while something is saved, while an old
    checkpoint is removed, and some steps later; the last ones while a finished run ends again.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert tiny_run(whole, *KILLED) == 0
    generator = random.Random(0)
    half_written = 0
    for count in range(KILLS):
        kind = ("start", "save", "prune", "step")[count % 4]
        process = begin(killed, die_while_pruning=kind == "prune")
        if kind == "start":
            time.sleep(generator.random() * STARTING_SECONDS)
        elif kind == "save":
            wait_while(process, lambda: not being_saved(killed))
            time.sleep(generator.random() * 0.02)
        elif kind == "step":
            goal = newest_step(killed) + generator.randint(1, 3)
            wait_while(process, lambda goal=goal: newest_step(killed) < goal)
            time.sleep(generator.random() * 0.03)
        assert kill(process, wait=kind == "prune"), "the run ended before its kill"
        half_written += being_saved(killed)
        assert_all_can_be_reached(killed)
    assert half_written > 5  # or the test tests less than it says
    assert os.waitpid(begin(killed), 0)[1] == 0
    ends = 0
    while ends < KILLS_AT_THE_END:
        process = begin(killed)
        time.sleep(generator.random() * ENDING_SECONDS)
        ends += kill(process)
        assert_all_can_be_reached(killed)
    assert tiny_run(killed, *KILLED, resume=True) == 0
    assert_same_run(killed, whole)
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


STARTING_SECONDS = 0.4  # about as long as setting up takes
ENDING_SECONDS = 1.5  # longer than setting up, evaluating and ending take together


def begin(output: Path, *, die_while_pruning: bool = False) -> int:
    """Start a training process; returns its id."""
    resume = (output / "training.json").exists()
    process = os.fork()
    if process == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if die_while_pruning:
            atomic_folder._delete = die_after_one_file
        try:
            os._exit(tiny_run(output, *KILLED, resume=resume))
        finally:
            os._exit(9)  # never back into pytest
    return process


def die_after_one_file(path: Path) -> None:
    if path.name.startswith(".step_") and path.name.endswith(".gone") and path.is_dir():
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def kill(process: int, *, wait: bool = False) -> bool:
    """Whether a process was there to be killed, or ended itself."""
    if not wait:
        os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def assert_all_can_be_reached(output: Path) -> None:
    found = checkpoints(output / "checkpoints")
    assert [find_damage(checkpoint) for checkpoint in found] == [None] * len(found)
    if found:
        run_folder.read_record(output)
    for name in ("best", "last"):
        models = [path for path in (output / name, output / f".{name}.old") if path.exists()]
        if models:
            assert run_folder.measured(models[0]) is not None
            assert load_file(models[0] / "model.safetensors")


def wait_while(process: int, condition: Callable[[], bool]) -> None:
    while condition():
        assert os.waitpid(process, os.WNOHANG) == (0, 0), "the run ended before its kill"
        time.sleep(0.0005)


def being_saved(output: Path) -> bool:
    return any(output.glob("**/.*.partial"))


def newest_step(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    try:
        return int(read_metrics(metrics)[-1]["step"]) if metrics.exists() else 0
    except (IndexError, json.JSONDecodeError):
        return 0


def test_default_output_is_named_after_head_and_assigner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = tiny_arguments(Path("unused"), "train.epochs=1").set
    assert train(Arguments(assigner="hungarian", set=settings)) == 0
    assert (tmp_path / "runs" / "stageinteractor-hungarian" / "results.json").is_file()
    assert train(Arguments(resume=True, output=None, assigner="hungarian", set=settings)) == 0
