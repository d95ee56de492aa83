"""Cross-stage labels against the rule written out, and what each option changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detrelay.assigners import CrossStageAssigner, HungarianAssigner
from detrelay.assigners.costs import GIoUBoxCost
from detrelay.core.boxes import cxcywh_to_xyxy, iou
from detrelay.core.structures import StagePrediction, Targets
from factories import as_set, make_stages, make_targets


def literal_rule(
    stages: list[StagePrediction], targets: Targets, window: tuple[int, int], threshold: float
) -> list[set[tuple[int, int]]]:
    """The released rule, restated query by query."""
    own = [as_set(a.boxes) for a in HungarianAssigner()(stages, targets)]
    result = []
    for i, stage in enumerate(stages):
        kept = set()
        for j in range(len(stages)):
            if not window[0] <= j - i <= window[1]:
                continue
            for query, target in own[j]:
                box = stage.boxes[targets.image[target], query]
                overlap = iou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(targets.boxes[target]))
                if overlap >= threshold:
                    kept.add((query, target))
        result.append(kept)
    return result


@pytest.mark.parametrize("window", [(-1, None), (0, 0), (None, None), (-2, 1), (0, 1)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_cross_stage_equals_literal_rule(window: Any, threshold: float) -> None:
    stages, targets = make_stages(stages=5), make_targets((4, 3))
    bounds = (-9 if window[0] is None else window[0], 9 if window[1] is None else window[1])
    assignments = CrossStageAssigner(window=window, iou_threshold=threshold)(stages, targets)
    assert [as_set(a.classes) for a in assignments] == literal_rule(
        stages, targets, bounds, threshold
    )


def overlap_case(overlap_width: float) -> tuple[list[StagePrediction], Targets]:
    """One object and one query whose box covers `overlap_width` of it, twice."""
    boxes = torch.tensor([[[0.25 + 0.5 * overlap_width / 2, 0.5, 0.5 * overlap_width, 0.5]]])
    stage = StagePrediction(torch.zeros(1, 1, 1), boxes)
    targets = Targets(torch.tensor([0]), torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([0]), 1)
    return [stage, stage], targets


def test_threshold_is_inclusive_by_default() -> None:
    stages, targets = overlap_case(0.5)  # IoU exactly one half
    assert len(CrossStageAssigner()(stages, targets)[0].classes) == 1
    assert len(CrossStageAssigner(inclusive=False)(stages, targets)[0].classes) == 0


def test_own_match_below_threshold_is_dropped_unless_kept() -> None:
    stages, targets = overlap_case(0.25)
    (dropped, _) = CrossStageAssigner()(stages, targets)
    assert len(dropped.classes) == 0
    assert len(dropped.boxes) == 1
    (kept, _) = CrossStageAssigner(keep_own=True)(stages, targets)
    assert as_set(kept.classes) == {(0, 0)}


def test_one_threshold_a_stage() -> None:
    stages, targets = overlap_case(0.5)
    first, second = CrossStageAssigner(iou_threshold=[0.4, 0.6])(stages, targets)
    assert (len(first.classes), len(second.classes)) == (1, 0)
    with pytest.raises(ValueError, match="3 values for 2 stages"):
        CrossStageAssigner(iou_threshold=[0.1, 0.2, 0.3])(stages, targets)


@pytest.mark.parametrize(("scope", "served"), [("early", [0, 1]), ("late", [2, 3, 4])])
def test_scope_serves_half_of_the_stages(scope: Any, served: list[int]) -> None:
    stages, targets = make_stages(stages=5), make_targets((4, 3))
    base = HungarianAssigner()(stages, targets)
    every = CrossStageAssigner(iou_threshold=0.1)(stages, targets)
    scoped = CrossStageAssigner(iou_threshold=0.1, scope=scope)(stages, targets)
    for index in range(5):
        expected = every if index in served else base
        assert as_set(scoped[index].classes) == as_set(expected[index].classes)
        assert as_set(every[index].classes) != as_set(base[index].classes)


def test_labels_stay_with_the_query_index() -> None:
    stages, targets = make_stages(stages=4), make_targets((4, 3))
    own = HungarianAssigner()(stages, targets)
    somewhere = set().union(*(as_set(a.boxes) for a in own))
    for assignment in CrossStageAssigner(window=(None, None), iou_threshold=0)(stages, targets):
        assert as_set(assignment.classes) == somewhere


class Calls(TorchDispatchMode):
    """Keeps the names of the operators that run; masks as indices are "masked"."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = [at for at in args[1] if at is not None] if name == "index" else []
        self.names["masked" if any(at.dtype == torch.bool for at in masks) else name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("leak", [False, True])
def test_labels_are_passed_on_without_waiting_for_the_device(leak: bool) -> None:
    stages, targets = make_stages(stages=5), make_targets((4, 3))
    own = HungarianAssigner()(stages, targets)
    with Calls() as calls:
        CrossStageAssigner(lambda *_: own, iou_threshold=0.1, leak=leak)(stages, targets)
    # each of these waits for results of the device before the next operator can be queued
    waiting = {"masked", "nonzero", "unique_dim", "_local_scalar_dense"}
    assert not waiting & calls.names.keys()
    assert calls.names["index"] <= len(stages) + 1  # the boxes of each stage, and the targets'


def test_any_base_assigner_serves() -> None:
    stages, targets = make_stages(stages=2), make_targets()
    base = HungarianAssigner([GIoUBoxCost()])
    own = base(stages, targets)
    crossed = CrossStageAssigner(base, window=(0, 0), iou_threshold=0)(stages, targets)
    assert [as_set(a.classes) for a in crossed] == [as_set(a.classes) for a in own]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (1, 2)}, "window must include offset 0"),
        ({"iou_threshold": 1.5}, r"iou_threshold must lie in \[0, 1\]"),
        ({"iou_threshold": []}, r"iou_threshold must lie in \[0, 1\]"),
        ({"scope": "middle"}, "scope must be"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossStageAssigner(**options)
