"""The training loop: one process or many, resumable to the bit."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from detrelay.core.configs import TrainConfig
from detrelay.core.criterion import Criterion, CriterionOutput
from detrelay.core.data.transforms import DetectionDataset, VisitSampler
from detrelay.core.detector import DetectorForObjectDetection
from detrelay.core.engine.checkpoint import (
    RunPosition,
    load_newest_checkpoint,
    save_checkpoint,
    save_model,
)
from detrelay.core.engine.inference import ImageResult, detect
from detrelay.core.engine.loaders import make_loader
from detrelay.core.engine.logging import MetricsLog, Progress
from detrelay.core.engine.optimizer import (
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)
from detrelay.core.evaluation.coco_ap import CocoResult, detections_from_results, evaluate_coco
from detrelay.core.image_processing import DetrelayImageProcessor
from detrelay.core.structures import Targets

_MEBIBYTE = 2**20


class TrainingInterrupted(Exception):
    """A stop signal came; the state is on disk.

    Attributes:
        signal_number: SIGINT or SIGTERM.
        step: step of the checkpoint to resume from.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number = signal_number
        self.step = step


@dataclass(frozen=True)
class TrainingParts:
    """What a run trains and on what.

    Attributes:
        model: on any device, in float32.
        processor: stored beside the model; turns outputs into boxes.
        criterion: the losses.
        train_data: images to learn from.
        val_data: images to evaluate on.
        ground_truth: COCO dict of the images to evaluate on.
        category_ids: original category id of each class index.
    """

    model: DetectorForObjectDetection
    processor: DetrelayImageProcessor
    criterion: Criterion
    train_data: DetectionDataset
    val_data: DetectionDataset
    ground_truth: dict[str, Any]
    category_ids: list[int]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation during training.

    Attributes:
        epoch: epochs done.
        step: optimiser steps done.
        scores: the COCO figures.
        image_ids: ids of the evaluated images.
        results: for each image `scores`, `labels` and `boxes` xyxy in pixels.
    """

    epoch: int
    step: int
    scores: CocoResult
    image_ids: list[int]
    results: list[ImageResult]


class StopSignals:
    """Remembers the first SIGTERM or SIGINT instead of dying; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])


class Trainer:
    """Trains a detector, evaluates it after epochs and keeps the best.

    Writes into `output`: `metrics.jsonl`, `checkpoints/`, `best/` and, at the end, `last/`.

    Args:
        accelerator: device, precision and processes.
        parts: model, data and criterion.
        settings: schedule and bookkeeping.
        num_workers: loader processes per training process.
        output: folder of the run.
        record: facts stored beside every saved model.
        on_evaluation: called on the main process after each evaluation.

    Raises:
        ValueError: fewer training images than one step needs.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parts: TrainingParts,
        settings: TrainConfig,
        *,
        num_workers: int,
        output: Path,
        record: Mapping[str, Any],
        on_evaluation: Callable[[Evaluation], None],
    ) -> None:
        self.accelerator = accelerator
        self.parts = parts
        self.settings = settings
        self.output = output
        self.record = dict(record)
        self.on_evaluation = on_evaluation
        self.position = RunPosition()
        self.metrics = MetricsLog(output / "metrics.jsonl", accelerator.is_main_process)
        self._sampler = parts.train_data.sampler()
        train_loader = make_loader(
            parts.train_data,
            self._sampler,
            settings.batch_size,
            num_workers=num_workers,
            drop_last=True,
        )
        val_loader = make_loader(
            parts.val_data,
            VisitSampler(len(parts.val_data), seed=0, shuffle=False),
            settings.batch_size,
            num_workers=num_workers,
        )
        self._model, self._optimizer, self._train_loader, self._val_loader = accelerator.prepare(
            parts.model, build_optimizer(parts.model, settings), train_loader, val_loader
        )
        self._parameters = [p for p in parts.model.parameters() if p.requires_grad]
        self.steps_per_epoch = len(self._train_loader)
        if self.steps_per_epoch == 0:
            needed = settings.batch_size * accelerator.num_processes
            raise ValueError(
                f"one step takes {needed} images, but there are {len(parts.train_data)} to train "
                f"on; lower train.batch_size"
            )

    def fit(self, *, resume: bool = False) -> Evaluation:
        """Train to the end of the last epoch.

        Args:
            resume: go on from the newest whole checkpoint in `output`.

        Returns:
            The last evaluation.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT came; a checkpoint was saved.
            FloatingPointError: a loss or a gradient is not finite; the last checkpoint is kept.
            CheckpointError: every checkpoint to resume from is damaged.
        """
        total = self.settings.epochs * self.steps_per_epoch
        if resume:
            self._restore()
        main = self.accelerator.is_main_process
        progress = Progress(total, self.position.step, enabled=main)
        last = None
        try:
            with StopSignals() as stop:
                while self.position.epoch < self.settings.epochs:
                    self._train_epoch(stop, progress)
                    if self._evaluation_is_due():
                        last = self._evaluate(stop, progress)
                    self.position = replace(self.position, epoch=self.position.epoch + 1, batch=0)
        finally:
            progress.close()
        assert last is not None  # the last epoch is always evaluated
        if main:
            self._save_model("last", last)
        self.accelerator.wait_for_everyone()
        return last

    def _restore(self) -> None:
        restored = load_newest_checkpoint(
            self.accelerator, self.output / "checkpoints", self.accelerator.print
        )
        if restored is None:
            self.accelerator.print("no checkpoint was taken yet: starting from step 0")
        else:
            self.position = restored
            self.accelerator.print(f"resuming after step {restored.step}")
        self.metrics.rewind(self.position.step)

    def _evaluation_is_due(self) -> bool:
        done = self.position.epoch + 1
        return done % self.settings.evaluate_every == 0 or done == self.settings.epochs

    def _train_epoch(self, stop: StopSignals, progress: Progress) -> None:
        """Train from the current position to the end of its epoch."""
        # accelerate renumbers the epoch from its own counter at each pass: set both
        self._train_loader.set_epoch(self.position.epoch)
        self._sampler.set_epoch(self.position.epoch)
        loader = self._train_loader
        if self.position.batch:
            loader = self.accelerator.skip_first_batches(loader, self.position.batch)
        self._model.train()
        meter = _SpeedMeter(self.settings.batch_size * self.accelerator.num_processes)
        for batch in loader if self.position.batch < self.steps_per_epoch else ():
            meter.batch_came()
            result, gradient_norm = self._step(batch)
            self.position = replace(
                self.position, step=self.position.step + 1, batch=self.position.batch + 1
            )
            progress.advance()
            meter.step_done()
            if self.position.step % self.settings.log_every == 0:
                self._log_step(result, gradient_norm, meter, progress)
            if self._should_stop(stop):
                self._interrupt(stop)
            if self.position.step % self.settings.checkpoint_every == 0:
                self._save_checkpoint()

    def _step(self, batch: Mapping[str, Any]) -> tuple[CriterionOutput, Tensor]:
        """One update of the weights; the losses, and the gradients' norm before clipping."""
        labels = batch["labels"]
        image_ids = torch.cat([label["image_id"] for label in labels]).tolist()
        targets = Targets.from_labels(labels)
        output = self._model(
            pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], targets=targets
        )
        try:
            result = self.parts.criterion(output.groups, targets, image_ids)
        except FloatingPointError as error:
            raise FloatingPointError(self._locate(str(error), image_ids)) from error
        self.accelerator.backward(result.total)
        limit = self.settings.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self._parameters, limit)
        # under fp16 the scaler meets infinite gradients by design and skips the step itself
        if self.settings.mixed_precision != "fp16" and not torch.isfinite(norm):
            raise FloatingPointError(self._locate("non-finite gradient", image_ids))
        factor = learning_rate_factor(self.position.step, self.steps_per_epoch, self.settings)
        set_learning_rate(self._optimizer, factor)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return result, norm

    def _locate(self, problem: str, image_ids: list[int]) -> str:
        step = self.position.step + 1
        return f"{problem}; in step {step}, whose batch holds the image ids {image_ids}"

    def _log_step(
        self, result: CriterionOutput, norm: Tensor, meter: _SpeedMeter, progress: Progress
    ) -> None:
        """One line of the log; the losses are those of this step, over all processes."""
        losses = torch.stack([result.total, *result.losses.values()]).detach()
        total, *named = self.accelerator.reduce(losses, reduction="mean").tolist()
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        images_per_second, waiting = meter.read()
        values = {
            "epoch": self.position.epoch + 1,
            "loss": total,
            "losses": dict(zip(result.losses, named, strict=True)),
            "learning_rate": rate,
            "gradient_norm": float(norm),
            "images_per_second": images_per_second,
            "data_wait_share": waiting,
        }
        if self.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.accelerator.device)
            values["peak_memory_mib"] = peak / _MEBIBYTE
        self.metrics.write("train", self.position.step, values)
        shown = {"loss": total, "lr": rate, "images/s": images_per_second}
        progress.report(self.position.epoch + 1, shown)

    def _evaluate(self, stop: StopSignals, progress: Progress) -> Evaluation:
        """Measure AP, note it, keep the model if it is the best so far."""
        self._save_checkpoint()

        def stop_if_asked() -> None:
            if self._should_stop(stop):
                self._raise_interrupted(stop)

        image_ids, results = detect(
            self.accelerator,
            self._model,
            self._val_loader,
            self.parts.processor,
            self.settings.max_detections,
            stop_if_asked,
        )
        scores = self._score(image_ids, results)
        done = self.position.epoch + 1
        evaluation = Evaluation(done, self.position.step, scores, image_ids, results)
        ap = scores.stats["AP"]
        is_best = self.position.best_step < 0 or ap > self.position.best_ap
        if is_best:
            self.position = replace(self.position, best_ap=ap, best_step=self.position.step)
        if self.accelerator.is_main_process:
            self.metrics.write("evaluation", self.position.step, {"epoch": done, **scores.stats})
            if is_best:
                self._save_model("best", evaluation)
            progress.message(
                f"epoch {done}: AP {ap:.4f}  AP50 {scores.stats['AP50']:.4f}"
                f"{'  (best so far)' if is_best else ''}"
            )
            self.on_evaluation(evaluation)
        self.accelerator.wait_for_everyone()
        return evaluation

    def _score(self, image_ids: list[int], results: list[ImageResult]) -> CocoResult:
        """The COCO figures, computed by the main process for all."""
        scores: list[CocoResult | None] = [None]
        if self.accelerator.is_main_process:
            rows = detections_from_results(results, image_ids, self.parts.category_ids)
            limit = self.settings.max_detections
            scores = [evaluate_coco(self.parts.ground_truth, rows, max_detections=limit)]
        broadcast_object_list(scores)
        assert scores[0] is not None
        return scores[0]

    def _save_model(self, name: str, evaluation: Evaluation) -> None:
        measured = {
            "epoch": evaluation.epoch,
            "step": evaluation.step,
            **evaluation.scores.to_dict(),
        }
        record = {**self.record, "measured": measured}
        save_model(self.parts.model, self.parts.processor, record, self.output / name)

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.accelerator,
            self.output / "checkpoints",
            self.position,
            self.settings.keep_checkpoints,
        )

    def _should_stop(self, stop: StopSignals) -> bool:
        """Whether any process got a signal; all processes agree."""
        if self.accelerator.num_processes == 1:
            return stop.received != 0
        flag = torch.tensor(stop.received, device=self.accelerator.device)
        stop.received = int(self.accelerator.gather(flag).max())
        return stop.received != 0

    def _interrupt(self, stop: StopSignals) -> NoReturn:
        self._save_checkpoint()
        self._raise_interrupted(stop)

    def _raise_interrupted(self, stop: StopSignals) -> NoReturn:
        raise TrainingInterrupted(stop.received, self.position.step)


class _SpeedMeter:
    """Images per second and the share of time spent waiting for data, between two readings."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self._start = self._last = time.perf_counter()
        self._steps = 0
        self._waited = 0.0

    def batch_came(self) -> None:
        self._waited += time.perf_counter() - self._last

    def step_done(self) -> None:
        self._steps += 1
        self._last = time.perf_counter()

    def read(self) -> tuple[float, float]:
        elapsed = time.perf_counter() - self._start
        speed = self._steps * self.images_per_step / elapsed
        share = self._waited / elapsed
        self._reset()
        return speed, share
