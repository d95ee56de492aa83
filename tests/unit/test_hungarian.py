"""The Hungarian matcher: least total cost, the choice between equals, one call for many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from detrelay.assigners import ASSIGNERS, CrossStageAssigner, HungarianAssigner
from detrelay.assigners.costs import default_costs
from detrelay.assigners.hungarian import minimum_cost_pairs, total_cost
from detrelay.core.criterion import Criterion
from detrelay.core.structures import StageGroup, StagePrediction, Targets
from factories import as_set, make_stages, make_targets


@pytest.mark.parametrize(
    ("cost", "queries"),
    [  # [T, Q]; with targets as rows, scipy's solver would answer the other way round
        ([[1, 0], [1, 0]], [0, 1]),
        ([[1, 1], [0, 0]], [1, 0]),
        ([[0, 0, 0], [0, 1, 0], [0, 1, 0]], [1, 0, 2]),
    ],
)
def test_ties_are_settled_with_queries_as_rows(cost: list[list[int]], queries: list[int]) -> None:
    query, target = minimum_cost_pairs(np.array(cost, dtype=np.float32)).T
    assert target.tolist() == list(range(len(cost)))
    assert query.tolist() == queries


def test_matching_minimises_the_total_of_a_hand_made_cost() -> None:
    # queries 0, 1, 2 against two targets: greedy would take (0, 0) = 1 and then (1, 1) = 9
    table = torch.tensor([[1.0, 2.0, 5.0], [3.0, 9.0, 8.0]])
    assigner = HungarianAssigner([lambda _prediction, _targets: table])
    targets = make_targets((2,))
    (assignment,) = assigner(make_stages(stages=1, batch=1, queries=3), targets)
    assert as_set(assignment.boxes) == {(1, 0), (0, 1)}
    assert assignment.classes is assignment.boxes


def test_more_targets_than_queries_leave_some_unmatched() -> None:
    targets = make_targets((5, 1))
    (assignment,) = HungarianAssigner()(make_stages(stages=1, queries=3), targets)
    assert len(assignment.boxes) == 4
    assert (assignment.boxes.image == 0).sum() == 3
    for name in ASSIGNERS:
        for each in ASSIGNERS[name]()(make_stages(queries=3), targets):
            assert torch.equal(targets.image[each.classes.target], each.classes.image)


def tied_stages(
    generator: torch.Generator, stages: int, batch: int, queries: int
) -> list[StagePrediction]:
    """Predictions of few values, so that many queries cost the same."""

    def few(*shape: int) -> torch.Tensor:
        return torch.randint(1, 3, shape, generator=generator).float()

    return [
        StagePrediction(few(batch, queries, 3), few(batch, queries, 4) / 8) for _ in range(stages)
    ]


def test_one_call_gives_the_pairs_of_the_loop_over_1000_tied_problems() -> None:
    generator = torch.Generator().manual_seed(0)
    costs, problems, tied = default_costs(), 0, 0
    while problems < 1000:
        counts = torch.randint(0, 7, (5,), generator=generator)
        image = torch.arange(5).repeat_interleave(counts)
        labels = torch.randint(3, image.shape, generator=generator)
        boxes = torch.randint(1, 3, (len(image), 4), generator=generator) / 8
        targets = Targets(labels, boxes, image, 5)
        sizes = torch.randint(1, 13, (3,), generator=generator).tolist()
        groups = [tied_stages(generator, 4, 5, queries) for queries in sizes]
        assigned = HungarianAssigner().assign_groups(groups, targets)
        for stages, found in zip(groups, assigned, strict=True):
            for stage, assignment in zip(stages, found, strict=True):
                cost = total_cost(costs, stage, targets).double().numpy()
                for own in range(5):
                    rows = np.flatnonzero(image.numpy() == own)
                    query, target = linear_sum_assignment(cost[rows].T)
                    here = assignment.boxes.select(assignment.boxes.image == own)
                    by_target = np.argsort(target)
                    assert here.query.tolist() == query[by_target].tolist()
                    assert here.target.tolist() == rows[target[by_target]].tolist()
                    problems += len(rows) > 0
                    tied += any(len(set(row)) < len(row) for row in cost[rows])
    assert tied > 500


@pytest.mark.parametrize("assigner", [HungarianAssigner(), CrossStageAssigner(iou_threshold=0.1)])
def test_groups_that_share_an_assigner_are_assigned_in_one_call(
    assigner: HungarianAssigner | CrossStageAssigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = make_targets((2, 0, 3))
    groups = [
        StageGroup(name, tuple(make_stages(batch=3, queries=queries, seed=seed)))
        for seed, (name, queries) in enumerate({"decoder": 8, "group/1": 8, "group/2": 5}.items())
    ]
    alone = {group.name: assigner(group.stages, targets) for group in groups}
    calls = []
    whole = type(assigner).assign_groups

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return whole(*arguments)

    monkeypatch.setattr(type(assigner), "assign_groups", counted)
    plan = Criterion([], dict.fromkeys(alone, assigner)).plan(groups, targets)
    assert len(calls) == 1
    for index, stage in enumerate(plan.stages):
        expected = alone[stage.group][index - [s.group for s in plan.stages].index(stage.group)]
        for kind in ("classes", "boxes"):
            for column in ("image", "query", "target"):
                assert torch.equal(
                    getattr(getattr(stage.assignment, kind), column),
                    getattr(getattr(expected, kind), column),
                )
