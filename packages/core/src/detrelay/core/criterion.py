"""The one criterion of all heads: groups of stages in, named losses out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from detrelay.core.loss_terms import CountingTerm, LossTerm, Normalizers, class_targets
from detrelay.core.progress import TrainingProgress
from detrelay.core.structures import (
    Assignment,
    GroupFacts,
    Pairs,
    StageGroup,
    StagePrediction,
    Targets,
)


class Assigner(Protocol):
    """Decides which queries are matched to which targets, seeing all stages of a group at once."""

    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> Sequence[Assignment]:
        """One `Assignment` per stage; inputs are never changed, nothing carries a gradient."""


@runtime_checkable
class GroupsAssigner(Assigner, Protocol):
    """An assigner that takes several groups at once, for one transfer instead of one a group."""

    def assign_groups(
        self, groups: Sequence[Sequence[StagePrediction]], targets: Targets
    ) -> Sequence[Sequence[Assignment]]:
        """For each group what a call with its stages alone would give."""


def assign_together(
    assigner: Assigner, groups: Sequence[Sequence[StagePrediction]], targets: Targets
) -> Sequence[Sequence[Assignment]]:
    """The assignments of several groups, in one call where the assigner can."""
    if isinstance(assigner, GroupsAssigner):
        return assigner.assign_groups(groups, targets)
    return [assigner(stages, targets) for stages in groups]


@dataclass(frozen=True, slots=True)
class CriterionOutput:
    """What training needs from one batch.

    Attributes:
        total: scalar, the weighted sum to call `backward` on.
        losses: unweighted terms by key, such as "decoder/5/giou"; same keys on every process.
        assignments: the assignments of each group, by group name, one per stage.
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
    """Every stage of a batch with its assignment, before any loss is computed.

    Attributes:
        stages: in the order of the groups.
        counts: float [S, 4] of each stage in this batch: positive class entries, box pairs,
            objects, and what its class loss counts itself.
    """

    stages: tuple[PlannedStage, ...]
    counts: Tensor


class Criterion:
    """Sums the loss terms over every stage of every group.

    Class scores learn from `Assignment.classes`, boxes from `Assignment.boxes`. Each term chooses
    its `Divisor`; unless given otherwise, class losses are divided by max(box pairs, positive class
    entries), box losses by box pairs. Divisors are counted over all batches and processes of one
    update and never below 1, then divided by the number of processes, whose gradients are averaged:
    N processes learn what one would from all their images. Losses are computed in float32 whatever
    the dtype of the model (float64 stays float64).

    Args:
        terms: the losses of a stage, each with its weight and divisor.
        assigners: assigner by group name; groups with `known_pairs` need none. Groups with the
            same object are assigned in one call, see `GroupsAssigner`.
        group_weights: factor of a group's losses in the total, 1 where not named.
        group_terms: losses by group name, for groups whose losses differ from `terms`.
        joins: by group name, the group whose assigner assigns this one too. It then sees the stages
            of all of them, those of the joining groups first. They must share their slots.
        progress: how far training has come; updated by the trainer.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        assigners: Mapping[str, Assigner],
        group_weights: Mapping[str, float] | None = None,
        *,
        group_terms: Mapping[str, Sequence[LossTerm]] | None = None,
        joins: Mapping[str, str] | None = None,
        progress: TrainingProgress | None = None,
    ) -> None:
        self.terms = tuple(terms)
        self.assigners = dict(assigners)
        self.group_weights = dict(group_weights or {})
        self.group_terms = {name: tuple(own) for name, own in (group_terms or {}).items()}
        self.joins = dict(joins or {})
        self.progress = progress or TrainingProgress()

    def terms_of(self, group: str) -> tuple[LossTerm, ...]:
        """The losses of a group's stages."""
        return self.group_terms.get(group, self.terms)

    def __call__(
        self,
        groups: Sequence[StageGroup],
        targets: Targets,
        image_ids: Sequence[int] | Tensor | None = None,
    ) -> CriterionOutput:
        """Losses of a batch that, with those of the other processes, makes one update.

        Args:
            groups: what the head returned in training.
            targets: the objects of the batch, on the device of the predictions.
            image_ids: dataset ids of the images, for error messages; a tensor is read only then.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names group, stage and images.
            ValueError: a label lies outside the model's classes, or a group has neither known pairs
                nor an assigner.
        """
        plan = self.plan(groups, targets)
        return self.losses(plan, sum_over_processes(plan.counts), image_ids)

    def plan(self, groups: Sequence[StageGroup], targets: Targets) -> Plan:
        """Assign every stage; processes need not call it together.

        Raises:
            FloatingPointError: a matching cost is NaN or infinite.
            ValueError: a label lies outside the model's classes, a group has neither known pairs
                nor an assigner or joins a group with which it shares no slots, or an assigner gave
                too few or too many assignments.
        """
        _check_labels(groups, targets)
        self._check_assigners(groups)
        predictions = {group.name: [stage.float() for stage in group.stages] for group in groups}
        assignments = self._assign(groups, predictions, targets)
        for group in groups:
            if group.known_pairs is not None:
                known = Assignment(classes=group.known_pairs, boxes=group.known_pairs)
                assignments[group.name] = [known] * len(group.stages)
        planned = []
        for group in groups:
            seen = _seen_by(group, targets)
            for index, stage in enumerate(predictions[group.name]):
                tag = f"{group.name}/{index}"
                assignment = assignments[group.name][index]
                planned.append(PlannedStage(tag, group.name, stage, seen, assignment))
        known_counts = {g.name: len(g.known_pairs) for g in groups if g.known_pairs is not None}
        counts = [self._count(stage, known_counts.get(stage.group)) for stage in planned]
        return Plan(tuple(planned), torch.stack(counts))

    def losses(
        self, plan: Plan, counts: Tensor, image_ids: Sequence[int] | Tensor | None = None
    ) -> CriterionOutput:
        """Losses of a planned batch.

        Args:
            plan: stages and assignments.
            counts: float [S, 4], as in the plan, summed over everything that makes one update:
                all processes, and all batches whose gradients are accumulated.
            image_ids: dataset ids of the images, for error messages; a tensor is read only then.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names group, stage and images.
        """
        losses: dict[str, Tensor] = {}
        total = plan.stages[0].prediction.logits.new_zeros(())
        for stage, normalizers in zip(plan.stages, _normalizers(counts), strict=True):
            weight = self.group_weights.get(stage.group, 1.0)
            for term in self.terms_of(stage.group):
                loss = term(stage.prediction, stage.targets, stage.assignment, normalizers)
                losses[f"{stage.tag}/{term.name}"] = loss
                total = total + weight * term.weight * loss
        if not torch.isfinite(total):
            raise FloatingPointError(_describe_non_finite(plan.stages, losses, image_ids))
        assignments: dict[str, tuple[Assignment, ...]] = {}
        for stage in plan.stages:
            assignments[stage.group] = (*assignments.get(stage.group, ()), stage.assignment)
        return CriterionOutput(total, losses, assignments)

    def _check_assigners(self, groups: Sequence[StageGroup]) -> None:
        served = {*self.assigners, *self.joins}
        missing = [g.name for g in groups if g.known_pairs is None and g.name not in served]
        if missing:
            raise ValueError(
                f"no assigner for stage groups {', '.join(missing)}; assigners are given for "
                f"{', '.join(self.assigners)}. Set groups.{missing[0]}.assigner.name in the recipe "
                f"or, where a model is called with labels, its loss_function to a Criterion with "
                f"an assigner for each"
            )

    def _members(self, leader: StageGroup, groups: Sequence[StageGroup]) -> list[StageGroup]:
        """The groups that an assigner sees together, joining groups first."""
        joining = [group for group in groups if self.joins.get(group.name) == leader.name]
        for group in joining:
            check_join(group, leader)
        return [*joining, leader]

    def _assign(
        self,
        groups: Sequence[StageGroup],
        predictions: Mapping[str, Sequence[StagePrediction]],
        targets: Targets,
    ) -> dict[str, list[Assignment]]:
        """Assign the groups without known pairs; those that share an assigner in one call."""
        calls: dict[tuple[int, bool], list[list[StageGroup]]] = {}
        for group in groups:
            if group.known_pairs is None and group.name not in self.joins:
                key = (id(self.assigners[group.name]), group.class_agnostic)
                calls.setdefault(key, []).append(self._members(group, groups))
        result: dict[str, list[Assignment]] = {}
        for together in calls.values():
            stages = [
                [stage for group in members for stage in predictions[group.name]]
                for members in together
            ]
            leader = together[0][-1]
            with torch.no_grad():
                detached = [[stage.detach().by_slot() for stage in own] for own in stages]
                assigner, seen = self.assigners[leader.name], _seen_by(leader, targets)
                found = assign_together(assigner, detached, seen)
            for members, own, assigned in zip(together, stages, found, strict=True):
                if len(assigned) != len(own):
                    raise ValueError(
                        f"the assigner of group {members[-1].name!r} must give one assignment for "
                        f"each of {len(own)} stages, found {len(assigned)}"
                    )
                rest = iter(_by_row(stage, one) for stage, one in zip(own, assigned, strict=True))
                result |= {group.name: [next(rest) for _ in group.stages] for group in members}
        return result

    def _count(self, stage: PlannedStage, known: int | None) -> Tensor:
        """What a stage contributes to the divisors, [4]; see `Plan`."""
        prediction, assignment = stage.prediction, stage.assignment
        positives = class_targets(prediction, stage.targets, assignment.classes).sum()
        objects = len(stage.targets) if known is None else known
        own = positives.new_zeros(())
        for term in self.terms_of(stage.group):
            if isinstance(term, CountingTerm):
                own = term.count(prediction, stage.targets, assignment).detach()
        pairs = len(assignment.boxes)
        return torch.stack(
            [positives, positives.new_tensor(pairs), positives.new_tensor(objects), own]
        )


def check_join(group: StageGroup | GroupFacts, leader: StageGroup | GroupFacts) -> None:
    """Reject joint assignment of groups whose queries or classes differ.

    Raises:
        ValueError: they do; says which.
    """
    if group.slot_space != leader.slot_space:
        raise ValueError(
            f"group {group.name!r} cannot join {leader.name!r}: they share no slots, query q of "
            f"one is not query q of the other"
        )
    if group.class_agnostic != leader.class_agnostic:
        raise ValueError(
            f"group {group.name!r} cannot join {leader.name!r}: only one of them tells classes "
            f"apart"
        )


def _seen_by(group: StageGroup, targets: Targets) -> Targets:
    return targets.class_agnostic() if group.class_agnostic else targets


def _by_row(stage: StagePrediction, assignment: Assignment) -> Assignment:
    """Pairs of rows, from pairs of slots."""
    if stage.slot is None:
        return assignment
    row = stage.slot.argsort(dim=1)  # [B, Q], the row of each slot

    def moved(pairs: Pairs) -> Pairs:
        return replace(pairs, query=row[pairs.image, pairs.query])

    return Assignment(classes=moved(assignment.classes), boxes=moved(assignment.boxes))


def _check_labels(groups: Sequence[StageGroup], targets: Targets) -> None:
    scored = [group.stages[0].logits.shape[-1] for group in groups if not group.class_agnostic]
    if scored:
        targets.check(min(scored))


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(counts: Tensor) -> Tensor:
    """The sum of the counts of all processes; to be called by all of them."""
    if _num_processes() > 1:
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts


def _normalizers(counts: Tensor) -> list[Normalizers]:
    # The larger count is chosen after summing: a choice by each process would depend on which
    # images it happens to hold.
    result = []
    for row in counts:
        positives, pairs, objects, own = row.unbind()
        result.append(Normalizers(positives, pairs, objects, own, _num_processes()))
    return result


def _describe_non_finite(
    plan: Sequence[PlannedStage],
    losses: Mapping[str, Tensor],
    image_ids: Sequence[int] | Tensor | None,
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
    named = [int(image_ids[row]) for row in rows] if image_ids is not None else rows
    kind = "image ids" if image_ids is not None else "images of the batch"
    return f"non-finite loss {', '.join(bad_losses) or 'total'}; {cause}; {kind}: {named}"
