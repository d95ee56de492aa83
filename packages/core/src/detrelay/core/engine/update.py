"""One update of the weights from one batch, or from several whose gradients are accumulated."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from detrelay.core.criterion import Criterion, CriterionOutput, sum_over_processes
from detrelay.core.engine.inference import model_inputs
from detrelay.core.structures import Assignment, Pairs, StageGroup, Targets


@dataclass(frozen=True)
class Update:
    """What one update has seen on this process.

    Attributes:
        total: scalar, weighted loss; its mean over processes is the loss of the update.
        losses: unweighted terms by key, likewise.
        gradient_norm: scalar, L2 norm of all gradients before clipping.
        assignments: of each batch, by group name, one per stage.
    """

    total: Tensor
    losses: dict[str, Tensor]
    gradient_norm: Tensor
    assignments: list[dict[str, tuple[Assignment, ...]]]


class Updater:
    """Turns batches into one optimiser step.

    Several batches make the same step as one large batch of all their images: the losses are
    divided by counts over all of them, which are known only once every batch has passed through the
    model and the assigners. So each batch is run twice with the same random numbers, first without
    gradients; that costs about a third of the time and no memory.

    Args:
        accelerator: precision and processes.
        model: prepared by the accelerator, in training mode.
        criterion: the losses.
        optimizer: prepared by the accelerator.
        clip_norm: limit of the L2 norm of all gradients together; 0 for no limit.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.clip_norm = clip_norm or math.inf
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batches: Sequence[Mapping[str, Any]]) -> Update:
        """Learn from batches; to be called by every process, with the same number of batches.

        Raises:
            FloatingPointError: a cost, a loss or a gradient is not finite, here or on another
                process; the weights are unchanged.
        """
        counts = self._count(batches) if len(batches) > 1 else None
        results = []
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                results.append(self._learn(batch, counts))
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.clip_norm)
        if norm is None:  # DeepSpeed has already clipped and stepped, and reports nothing
            norm = torch.tensor(math.nan)
        # under fp16 the scaler meets infinite gradients by design and skips the step itself
        elif self.accelerator.mixed_precision != "fp16" and not torch.isfinite(norm):
            raise FloatingPointError("non-finite gradient")
        self.optimizer.step()
        self.optimizer.zero_grad()
        losses = {
            key: torch.stack([result.losses[key].detach() for result in results]).sum()
            for key in results[0].losses
        }
        total = torch.stack([result.total.detach() for result in results]).sum()
        return Update(total, losses, norm, [result.assignments for result in results])

    def _learn(self, batch: Mapping[str, Any], counts: Tensor | None) -> CriterionOutput:
        """Add the gradients of one batch."""
        targets, image_ids = _objects(batch)
        groups = self._forward(batch, targets)
        with self._together():
            plan = self.criterion.plan(groups, targets)
        if counts is None:
            counts = sum_over_processes(plan.counts)
        with self._together():
            result = self.criterion.losses(plan, counts, image_ids)
        self.accelerator.backward(result.total)
        return result

    @torch.no_grad()
    def _count(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """The counts the criterion divides by, [S, 4]; its passes leave all state unchanged."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        device = self.accelerator.device
        counts = []
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self._together():
            for batch in batches:
                targets, _ = _objects(batch)
                counts.append(self.criterion.plan(self._forward(batch, targets), targets).counts)
        for buffer, before in buffers:
            buffer.copy_(before)
        return sum_over_processes(torch.stack(counts).sum(0))

    def _forward(self, batch: Mapping[str, Any], targets: Targets) -> tuple[StageGroup, ...]:
        output = self.model(**model_inputs(batch), targets=targets)
        groups: tuple[StageGroup, ...] = output.groups
        return groups

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Let a non-finite value on one process end the step on all, so that none hangs."""
        problem = None
        try:
            yield
        except FloatingPointError as error:
            problem = error
        bad: list[int] = []
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([problem is not None], device=self.accelerator.device)
            bad = self.accelerator.gather(flag).nonzero().flatten().tolist()
        if problem is not None:
            raise problem
        if bad:
            raise FloatingPointError(
                f"non-finite value on process {bad[0]}, whose message names it"
            )


def assignment_counts(update: Update, groups: Container[str]) -> tuple[list[str], Tensor]:
    """How the stages of an update were supervised on this process.

    Args:
        update: with the assignments of its batches.
        groups: names of the stage groups to count.

    Returns:
        Tags such as "decoder/5", and float [S, 3]: box matches, class labels, and those class
        labels that are not the stage's own matches.
    """
    rows: dict[str, Tensor] = {}
    for assignments in update.assignments:
        for group, stages in assignments.items():
            if group not in groups:
                continue
            for index, stage in enumerate(stages):
                moved = len(stage.classes) - _common(stage.classes, stage.boxes)
                row = torch.tensor([len(stage.boxes), len(stage.classes), moved]).float()
                tag = f"{group}/{index}"
                rows[tag] = rows.get(tag, torch.zeros(3)) + row
    return list(rows), torch.stack([*rows.values(), torch.zeros(3)])[:-1]


def _common(first: Pairs, second: Pairs) -> int:
    """How many pairs of query and target are in both; a target implies its image."""
    own = set(zip(second.query.tolist(), second.target.tolist(), strict=True))
    return sum(
        pair in own for pair in zip(first.query.tolist(), first.target.tolist(), strict=True)
    )


def _objects(batch: Mapping[str, Any]) -> tuple[Targets, Tensor]:
    labels = batch["labels"]
    return Targets.from_labels(labels), torch.cat([label["image_id"] for label in labels])
