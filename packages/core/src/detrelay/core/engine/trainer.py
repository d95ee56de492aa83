"""The training loop: one process or many, resumable to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

from detrelay.core.data.streaming import StreamedSamples
from detrelay.core.data.transforms import DetectionDataset
from detrelay.core.detector.checkpointing import checkpoint_activations
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine import run_folder
from detrelay.core.engine.batches import train_batches
from detrelay.core.engine.checkpoint import (
    CheckpointError,
    RunPosition,
    load_newest_checkpoint,
    save_checkpoint,
    save_model,
    written_together,
)
from detrelay.core.engine.ema import average_of
from detrelay.core.engine.failure import NonFiniteStep, random_states, save_failure
from detrelay.core.engine.feature_cache import CachedFeatures, FeatureMemory
from detrelay.core.engine.inference import ImageResult, detect
from detrelay.core.engine.loaders import make_eval_loader
from detrelay.core.engine.logging import MetricsLog, Progress, SpeedMeter
from detrelay.core.engine.memory import peak_memory_mib
from detrelay.core.engine.optimizer import (
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)
from detrelay.core.engine.parts import Evaluation, TrainingParts
from detrelay.core.engine.precision import allow_tf32
from detrelay.core.engine.scaling import with_scaled_rate
from detrelay.core.engine.stopping import StopSignals, TrainingInterrupted
from detrelay.core.engine.update import Update, Updater, assignment_counts
from detrelay.core.evaluation.coco_ap import CocoResult
from detrelay.core.evaluation.tables import Detections
from detrelay.core.recipes.recipe import TrainConfig

__all__ = ["Evaluation", "StopSignals", "Trainer", "TrainingInterrupted", "TrainingParts"]


class Trainer:
    """Trains a detector, evaluates it after epochs and keeps the best.

    Writes into `output` the log, checkpoints, the best model and, at the end, the last one; a
    non-finite step is saved in a folder of failures (`run_folder` has the names).

    Args:
        accelerator: device, precision and processes.
        parts: model, data and criterion.
        settings: schedule and bookkeeping.
        num_workers: loader processes per training process.
        output: folder of the run.
        record: facts stored with every checkpoint and every saved model.
        on_evaluation: called on the main process after each evaluation.

    Raises:
        ValueError: there are fewer training images than one step needs.
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
        self.metrics = MetricsLog(
            output / run_folder.METRICS, accelerator.is_main_process, forward=accelerator.log
        )
        per_process = settings.batch_size * settings.accumulation_steps
        self.images_per_step = per_process * accelerator.num_processes
        self.position = RunPosition(images_per_step=self.images_per_step)
        train_data, val_data = self._data()
        self._batches = train_batches(
            accelerator,
            train_data,
            settings.batch_size,
            settings.accumulation_steps,
            num_workers=num_workers,
            divisor=parts.processor.pad_size_divisor,
        )
        self._val_loader = make_eval_loader(
            val_data,
            settings.batch_size,
            parts.processor.pad_size_divisor,
            num_workers=num_workers,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        self._prepare()
        self.steps_per_epoch = len(self._batches) // settings.accumulation_steps
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"one step takes {self.images_per_step} images, but there are "
                f"{self._batches.num_images} to train on; lower train.batch_size"
            )

    def _data(
        self,
    ) -> tuple[
        DetectionDataset | StreamedSamples | CachedFeatures, DetectionDataset | CachedFeatures
    ]:
        """What is trained on and what is evaluated on."""
        train, val = self.parts.train_data, self.parts.val_data
        if not self.settings.feature_cache_gib:
            return train, val
        if isinstance(train, StreamedSamples):
            raise ValueError(
                "train.feature_cache_gib keeps the feature maps of every image, for which a stream "
                "(data.stream) is too long; set train.feature_cache_gib=0"
            )
        _refuse_sharding(self.accelerator, "train.feature_cache_gib", "0")
        memory = FeatureMemory(int(self.settings.feature_cache_gib * 2**30))
        model, accelerator = self.parts.model, self.accelerator
        cached = [CachedFeatures(part, model, accelerator, memory) for part in (train, val)]
        return cached[0], cached[1]

    def _prepare(self) -> None:
        accelerator, model, settings = self.accelerator, self.parts.model, self.settings
        allow_tf32(settings.tf32)
        if settings.accumulation_steps > 1:
            _refuse_sharding(accelerator, "train.accumulation_steps", "1")
        self._average = None
        if settings.ema_decay > 0:
            _refuse_sharding(accelerator, "train.ema_decay", "0")
            self._average = average_of(model, settings.ema_decay)
        if settings.activation_checkpointing:
            checkpoint_activations(model)
        if settings.compile:
            model.compile(dynamic=True)
        optimizer = build_optimizer(model, with_scaled_rate(settings, self.images_per_step))
        loaders = self._batches.unprepared
        self._model, self._optimizer, *prepared = accelerator.prepare(model, optimizer, *loaders)
        self._batches.take(prepared)
        if self._average is not None:
            # as one of the accelerator's models it is part of every checkpoint
            accelerator.prepare_model(self._average.module, evaluation_mode=True)
        self._update = Updater(
            accelerator, self._model, self.parts.criterion, self._optimizer, settings.clip_norm
        )

    def fit(self, *, resume: bool = False) -> Evaluation:
        """Train to the end of the last epoch.

        Args:
            resume: continue from the newest complete checkpoint in `output`.

        Returns:
            The last evaluation.

        Raises:
            TrainingInterrupted: SIGTERM or SIGINT arrived; a checkpoint was saved.
            NonFiniteStep: a loss or a gradient is not finite; the step is saved for
                `replay_failure` and the last checkpoint is kept.
            CheckpointError: every checkpoint is damaged or was saved with another number of images
                per step, or the disk is full.
        """
        total = self.settings.epochs * self.steps_per_epoch
        if resume:
            self._restore()
        main = self.accelerator.is_main_process
        progress = Progress(total, self.position.step, enabled=main)
        last = None
        try:
            with StopSignals() as stop:
                while self.position.epoch < self.settings.epochs and not self._is_stale():
                    self._train_epoch(stop, progress)
                    if self._evaluation_is_due():
                        last = self._evaluate(stop, progress)
                    self.position = replace(self.position, epoch=self.position.epoch + 1, batch=0)
                if last is None:  # resumed with fewer epochs or less patience than already used
                    last = self._evaluate(stop, progress)
        finally:
            progress.close()
        self._save_model(run_folder.LAST, last)
        return last

    def _restore(self) -> None:
        of_recipe = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        restored = load_newest_checkpoint(
            self.accelerator, self.output / run_folder.CHECKPOINTS, self.accelerator.print
        )
        # rates and decays are loaded with the state; if they changed, the recipe's apply
        for group, own in zip(self._optimizer.param_groups, of_recipe, strict=True):
            group.update(own)
        if restored is None:
            self.accelerator.print("no checkpoint was saved yet: starting from step 0")
        else:
            self._check_images_per_step(restored)
            self.position = self._without_lost_best(restored)
            self.accelerator.print(f"resuming after step {restored.step}")
        if damaged := self.metrics.rewind(self.position.step):
            self.accelerator.print(
                f"{self.metrics.path}: left out {damaged} damaged line(s); the log as it was is "
                f"kept next to it"
            )

    def _without_lost_best(self, restored: RunPosition) -> RunPosition:
        """The position, without its best evaluation if that model is no longer there."""
        best = self.output / run_folder.BEST
        lost = [restored.best_step >= 0 and run_folder.measured(best) is None]
        broadcast_object_list(lost)  # only the first machine has the folder
        if not lost[0]:
            return restored
        self.accelerator.print(
            f"{best} is missing or damaged (AP {restored.best_ap:.4f} after step "
            f"{restored.best_step}); the next evaluation counts as the best so far"
        )
        return replace(restored, best_ap=-1.0, best_step=-1, stale=0)

    def _check_images_per_step(self, restored: RunPosition) -> None:
        """A step must have as many images as before, on however many processes."""
        if restored.images_per_step == self.images_per_step:
            return
        processes = self.accelerator.num_processes
        share, rest = divmod(restored.images_per_step, processes * self.settings.batch_size)
        advice = "set train.batch_size and train.accumulation_steps"
        if share and not rest:
            advice = f"--set train.accumulation_steps={share} does it"
        elif restored.images_per_step % processes == 0:
            size = restored.images_per_step // processes
            advice = f"--set train.batch_size={size} train.accumulation_steps=1 does it"
        raise CheckpointError(
            f"--resume: a step of this run takes {restored.images_per_step} images, but "
            f"{processes} process(es) with train.batch_size={self.settings.batch_size} and "
            f"train.accumulation_steps={self.settings.accumulation_steps} take "
            f"{self.images_per_step}; the product must stay: {advice}"
        )

    def _evaluation_is_due(self) -> bool:
        done = self.position.epoch + 1
        return done % self.settings.evaluate_every == 0 or done == self.settings.epochs

    def _is_stale(self) -> bool:
        patience = self.settings.early_stopping_patience
        return 0 < patience <= self.position.stale

    def _train_epoch(self, stop: StopSignals, progress: Progress) -> None:
        """Train from the current position to the end of its epoch."""
        if self.position.batch == self.steps_per_epoch:
            return
        count = self.settings.accumulation_steps
        loader = self._batches.epoch(self.position.epoch, self.position.batch * count)
        self._model.train()
        meter = SpeedMeter(self.images_per_step)
        for loaded in _whole_groups(loader, count):
            meter.batch_came()
            batches = [self.parts.processor.normalize_batch(batch) for batch in loaded]
            total = self.settings.epochs * self.steps_per_epoch
            self.parts.criterion.progress.share = self.position.step / total
            update = self._step(batches)
            self.position = replace(
                self.position, step=self.position.step + 1, batch=self.position.batch + 1
            )
            progress.advance()
            meter.step_done()
            if self.position.step % self.settings.log_every == 0:
                self._log_step(update, batches, meter, progress)
            if self._should_stop(stop):
                self._interrupt(stop)
            if self.position.step % self.settings.checkpoint_every == 0:
                self._save_checkpoint()

    def _step(self, batches: Sequence[Mapping[str, Any]]) -> Update:
        """One update of the weights."""
        factor = learning_rate_factor(self.position.step, self.steps_per_epoch, self.settings)
        set_learning_rate(self._optimizer, factor)
        states = random_states(self.accelerator.device)
        try:
            update = self._update(batches)
        except FloatingPointError as error:
            raise self._keep_failure(str(error), batches, states) from error
        if self._average is not None:
            self._average.update_parameters(self.parts.model)
        return update

    def _keep_failure(
        self, problem: str, batches: Sequence[Mapping[str, Any]], states: Mapping[str, Tensor]
    ) -> NonFiniteStep:
        """Save a failed step; returns the error to raise."""
        step = self.position.step + 1
        image_ids = [int(label["image_id"]) for batch in batches for label in batch["labels"]]
        message = f"{problem}; in step {step}, whose batch holds the image ids {image_ids}"
        if _is_sharded(self.accelerator):
            return NonFiniteStep(f"{message}, not saved: no process holds all weights", None)
        share = self.parts.criterion.progress.share
        facts = {"step": step, "progress": share, "image_ids": image_ids, "problem": problem}
        folder = self.output / run_folder.FAILURES / f"step_{step:07d}"
        try:
            file = save_failure(self.accelerator, folder, self.parts.model, batches, states, facts)
        except (OSError, SafetensorError) as error:
            return NonFiniteStep(f"{message}, which cannot be saved ({error})", None)
        return NonFiniteStep(message, file)

    def _log_step(
        self,
        update: Update,
        batches: Sequence[Mapping[str, Any]],
        meter: SpeedMeter,
        progress: Progress,
    ) -> None:
        """One line of the log; the losses are those of this step, over all processes."""
        real = torch.stack([batch["pixel_mask"].float().mean() for batch in batches]).mean()
        figures = torch.stack([real, update.total, *update.losses.values()])
        real_share, total, *named = self.accelerator.reduce(figures, reduction="mean").tolist()
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        images_per_second, waiting = meter.read()
        values = {
            "epoch": self.position.epoch + 1,
            "loss": total,
            "losses": dict(zip(update.losses, named, strict=True)),
            "learning_rate": rate,
            "gradient_norm": float(update.gradient_norm),
            "images_per_second": images_per_second,
            "data_wait_share": waiting,
            "real_pixel_share": real_share,
            "peak_memory_mib": peak_memory_mib(self.accelerator.device),
            **self._assignment_figures(update),
        }
        self.metrics.write("train", self.position.step, values)
        shown = {"loss": total, "lr": rate, "images/s": images_per_second}
        progress.report(self.position.epoch + 1, shown)

    def _assignment_figures(self, update: Update) -> dict[str, dict[str, float]]:
        """For each stage: matches per image, and the share of its labels from other stages."""
        tags, counts = assignment_counts(update, self.parts.criterion.assigners)
        rows = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum").tolist()
        return {
            "matches_per_image": {
                tag: matches / self.images_per_step
                for tag, (matches, _, _) in zip(tags, rows, strict=True)
            },
            "moved_labels_share": {
                tag: moved / max(labels, 1)
                for tag, (_, labels, moved) in zip(tags, rows, strict=True)
            },
        }

    @property
    def _published_model(self) -> DetectorForObjectDetection:
        """The weights that are evaluated and published."""
        if self._average is None:
            return self.parts.model
        assert isinstance(self._average.module, DetectorForObjectDetection)
        return self._average.module

    def _evaluate(self, stop: StopSignals, progress: Progress) -> Evaluation:
        """Measure and log AP; save the model if it is the best so far."""
        self._save_checkpoint()

        def stop_if_asked() -> None:
            if self._should_stop(stop):
                self._raise_interrupted(stop)

        image_ids, results = detect(
            self.accelerator,
            self._model if self._average is None else self._published_model,
            self._val_loader,
            self.parts.processor,
            self.settings.max_detections,
            stop_if_asked,
        )
        scores = self._score(image_ids, results)
        done = self.position.epoch + 1
        evaluation = Evaluation(done, self.position.step, scores, image_ids, results)
        main = scores.main[1]
        is_best = self.position.best_step < 0 or main > self.position.best_ap
        if is_best:
            step = self.position.step
            self.position = replace(self.position, best_ap=main, best_step=step, stale=0)
        else:
            self.position = replace(self.position, stale=self.position.stale + 1)
        if is_best:
            self._save_model(run_folder.BEST, evaluation)
        first_two = [*scores.stats.items()][:2]
        if self.accelerator.is_main_process:
            self.metrics.write("evaluation", self.position.step, {"epoch": done, **scores.stats})
            progress.message(
                f"epoch {done}: {'  '.join(f'{k} {v:.4f}' for k, v in first_two)}"
                f"{'  (best so far)' if is_best else ''}"
                f"{'  (no improvement: stopping early)' if self._is_stale() else ''}"
            )
            self.on_evaluation(evaluation)
        self.accelerator.wait_for_everyone()
        return evaluation

    def _score(self, image_ids: list[int], results: list[ImageResult]) -> CocoResult:
        """The figures of the evaluator, computed by the main process for all."""
        scores: list[CocoResult | None] = [None]
        if self.accelerator.is_main_process:
            found = Detections.from_results(results, image_ids, self.parts.category_ids)
            limit = self.settings.max_detections
            scores = [self.parts.evaluator(self.parts.ground_truth, found, max_detections=limit)]
        broadcast_object_list(scores)
        assert scores[0] is not None
        return scores[0]

    def _save_model(self, name: str, evaluation: Evaluation) -> None:
        """Write the folder `name`; to be called by every process."""
        measured = {
            "epoch": evaluation.epoch,
            "step": evaluation.step,
            **evaluation.scores.to_dict(),
        }
        record = {**self.record, "measured": measured}
        target, weights = self.output / name, None
        if _is_sharded(self.accelerator):
            weights = self.accelerator.get_state_dict(self._model)
        with written_together(self.accelerator, target):
            if self.accelerator.is_main_process:
                save_model(self._published_model, self.parts.processor, record, target, weights)

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.accelerator,
            self.output / run_folder.CHECKPOINTS,
            self.position,
            self.settings.keep_checkpoints,
            record=self.record,
            on_each_node=self.settings.save_on_each_node,
        )
        self.metrics.sync()

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


def _whole_groups(loader: Iterator[Any], count: int) -> Iterator[list[Any]]:
    """Every `count` batches in a row; what is left over at the end is dropped."""
    batches = iter(loader)
    while len(group := list(islice(batches, count))) == count:
        yield group


def _is_sharded(accelerator: Accelerator) -> bool:
    """Whether processes hold shards of the weights instead of all of them."""
    kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    return accelerator.distributed_type in kinds


def _refuse_sharding(accelerator: Accelerator, option: str, value: str) -> None:
    if _is_sharded(accelerator):
        raise ValueError(
            f"{option} needs whole weights in every process and cannot be used with "
            f"{accelerator.distributed_type.value}; set {option}={value}"
        )
