"""The one criterion of all heads: groups of stages in, named losses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from detrelay.core.losses import LossTerm, Normalizers, class_targets
from detrelay.core.structures import Assignment, StageGroup, StagePrediction, Targets


class Assigner(Protocol):
    """Decides which queries answer which targets, seeing all stages of a group at once."""

    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> Sequence[Assignment]:
        """One `Assignment` a stage; inputs are never changed, nothing carries a gradient."""


@dataclass(frozen=True, slots=True)
class CriterionOutput:
    """What training needs from one batch.

    Attributes:
        total: scalar, the weighted sum that is differentiated.
        losses: unweighted terms by key, such as "decoder/5/giou"; same keys on every process.
        assignments: the assignments of each group, by group name, one a stage.
    """

    total: Tensor
    losses: dict[str, Tensor]
    assignments: dict[str, tuple[Assignment, ...]]


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage with everything its losses need.

    Attributes:
        tag: first parts of its loss keys, such as "decoder/5".
        group: name of its group.
        prediction: in float32 or more.
        targets: the objects as the group sees them.
        assignment: who learns what.
    """

    tag: str
    group: str
    prediction: StagePrediction
    targets: Targets
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Plan:
    """Every stage of a batch with its assignment, before any loss is taken.

    Attributes:
        stages: in the order of the groups.
        counts: float [S, 2], positive class entries and box pairs of each stage in this batch.
    """

    stages: tuple[PlannedStage, ...]
    counts: Tensor


class Criterion:
    """Sums the loss terms over every stage of every group.

    Class scores learn from `Assignment.classes`, boxes from `Assignment.boxes`. Class losses are
    divided by max(box pairs, positive class entries), box losses by box pairs, both counted over
    all batches and processes of one update and never below 1, then divided by the number of
    processes, whose gradients are averaged: N processes learn what one would from all their
    images. Losses are taken in float32 whatever the dtype of the model (float64 stays float64).

    Args:
        terms: the losses of a stage, each with its weight.
        assigners: assigner by group name; groups with `known_pairs` need none.
        group_weights: factor of a group's losses in the total, 1 where not named.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        assigners: Mapping[str, Assigner],
        group_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.terms = tuple(terms)
        self.assigners = dict(assigners)
        self.group_weights = dict(group_weights or {})

    def __call__(
        self,
        groups: Sequence[StageGroup],
        targets: Targets,
        image_ids: Sequence[int] | None = None,
    ) -> CriterionOutput:
        """Losses of one batch that makes an update by itself, with the other processes' batches.

        Args:
            groups: what the head returned in training.
            targets: the objects of the batch, on the device of the predictions.
            image_ids: data-set ids of the images, for error messages.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names group, stage and images.
            KeyError: a group has neither known pairs nor an assigner.
            ValueError: a label lies outside the model's classes.
        """
        plan = self.plan(groups, targets)
        return self.losses(plan, sum_over_processes(plan.counts), image_ids)

    def plan(self, groups: Sequence[StageGroup], targets: Targets) -> Plan:
        """Assign every stage; processes need not do so together.

        Raises:
            FloatingPointError: a matching cost is NaN or infinite.
            KeyError: a group has neither known pairs nor an assigner.
            ValueError: a label lies outside the model's classes.
        """
        _check_labels(groups, targets)
        stages = tuple(stage for group in groups for stage in self._plan_group(group, targets))
        return Plan(stages, torch.stack([_count(stage) for stage in stages]))

    def losses(
        self, plan: Plan, counts: Tensor, image_ids: Sequence[int] | None = None
    ) -> CriterionOutput:
        """Losses of a planned batch.

        Args:
            plan: stages and assignments.
            counts: float [S, 2], as in the plan, summed over everything that makes one update:
                all processes, and all batches whose gradients are accumulated.
            image_ids: data-set ids of the images, for error messages.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names group, stage and images.
        """
        losses: dict[str, Tensor] = {}
        total = plan.stages[0].prediction.logits.new_zeros(())
        for stage, normalizers in zip(plan.stages, _normalizers(counts), strict=True):
            weight = self.group_weights.get(stage.group, 1.0)
            for term in self.terms:
                loss = term(stage.prediction, stage.targets, stage.assignment, normalizers)
                losses[f"{stage.tag}/{term.name}"] = loss
                total = total + weight * term.weight * loss
        if not torch.isfinite(total):
            raise FloatingPointError(_describe_non_finite(plan.stages, losses, image_ids))
        assignments: dict[str, tuple[Assignment, ...]] = {}
        for stage in plan.stages:
            assignments[stage.group] = (*assignments.get(stage.group, ()), stage.assignment)
        return CriterionOutput(total, losses, assignments)

    def _plan_group(self, group: StageGroup, targets: Targets) -> list[PlannedStage]:
        targets = targets.class_agnostic() if group.class_agnostic else targets
        stages = [stage.float() for stage in group.stages]
        if group.known_pairs is not None:
            known = Assignment(classes=group.known_pairs, boxes=group.known_pairs)
            assignments: Sequence[Assignment] = [known] * len(stages)
        elif group.name in self.assigners:
            with torch.no_grad():
                detached = [stage.detach() for stage in stages]
                assignments = self.assigners[group.name](detached, targets)
        else:
            raise KeyError(
                f"no assigner for stage group {group.name!r}; assigners are given for "
                f"{sorted(self.assigners)}"
            )
        return [
            PlannedStage(f"{group.name}/{index}", group.name, prediction, targets, assignment)
            for index, (prediction, assignment) in enumerate(zip(stages, assignments, strict=True))
        ]


def _check_labels(groups: Sequence[StageGroup], targets: Targets) -> None:
    highest = int(targets.labels.max()) if len(targets) else -1
    for group in groups:
        num_classes = group.stages[0].logits.shape[-1]
        if not group.class_agnostic and highest >= num_classes:
            raise ValueError(
                f"class label {highest} found, but the model scores {num_classes} classes in its "
                f"{group.name} stages (labels run from 0)"
            )


def _count(stage: PlannedStage) -> Tensor:
    """Positive class entries and box pairs of a stage, [2]."""
    wanted = class_targets(stage.prediction, stage.targets, stage.assignment.classes)
    return torch.stack([wanted.sum(), wanted.new_tensor(len(stage.assignment.boxes))])


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(counts: Tensor) -> Tensor:
    """The sum of every process's counts; to be called by all of them."""
    if _num_processes() > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def _normalizers(counts: Tensor) -> list[Normalizers]:
    # The larger count is chosen after summing: a choice by each process would depend on which
    # images it happens to hold.
    divisors = torch.stack([counts.amax(1), counts[:, 1]], dim=1)  # [S, 2]
    divisors = divisors.clamp(min=1) / _num_processes()
    return [Normalizers(classes=row[0], boxes=row[1]) for row in divisors]


def _describe_non_finite(
    plan: Sequence[PlannedStage],
    losses: Mapping[str, Tensor],
    image_ids: Sequence[int] | None,
) -> str:
    """Name the losses, the first bad stage and its images."""
    bad_losses = [key for key, loss in losses.items() if not torch.isfinite(loss)]
    for stage in plan:
        finite = torch.isfinite(stage.prediction.logits).flatten(1).all(1) & torch.isfinite(
            stage.prediction.boxes
        ).flatten(1).all(1)  # [B]
        if not finite.all():
            rows = (~finite).nonzero().flatten().tolist()
            cause = f"first non-finite predictions in {stage.tag}"
            break
    else:
        targets = plan[0].targets
        target_ok = torch.isfinite(targets.boxes).all(1)
        rows = sorted(set(targets.image[~target_ok].tolist())) or list(range(targets.batch_size))
        cause = "predictions are finite" + ("" if target_ok.all() else ", target boxes are not")
    named = [image_ids[row] for row in rows] if image_ids is not None else rows
    kind = "image ids" if image_ids is not None else "images of the batch"
    return f"non-finite loss {', '.join(bad_losses) or 'total'}; {cause}; {kind}: {named}"
