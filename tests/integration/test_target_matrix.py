"""Every assigner with every class loss on every head; every pass over two processes; the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from detrelay.apps.training_targets import build_criterion
from detrelay.assigners import ASSIGNERS
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.criterion import Criterion
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.engine.update import Updater
from detrelay.core.recipes.recipe import AssignerSettings, GroupSettings, Recipe
from detrelay.heads import HEADS
from factories import make_boxes, make_targets, small_head_config
from processes import in_processes
from target_matrix import CASES, PAGE, Cell, assigner_rows, cells, page, recipe_of
from tiny_run import shrink_backbone

CELLS = list(cells())
# each assigner, class loss and head at least once
SAMPLE = [
    Cell(
        list(ASSIGNERS)[index % len(ASSIGNERS)],
        list(CLASS_LOSSES)[index % len(CLASS_LOSSES)],
        list(CASES)[index % len(CASES)],
    )
    for index in range(max(12, len(ASSIGNERS), len(CLASS_LOSSES), len(CASES)))
]
IMAGE_SIZE = (64, 96)


@pytest.fixture(scope="module", autouse=True)
def small_backbone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield
    torch.set_num_threads(threads)
    start_of.cache_clear()


def small_model(case: str, **settings: Any) -> DetectorForObjectDetection:
    torch.manual_seed(0)
    config = small_head_config(case, backbone_norm="eval", **settings)
    return HEADS[CASES[case][0]].model(config).train()


@cache
def start_of(case: str) -> tuple[DetectorForObjectDetection, dict[str, torch.Tensor]]:
    """A model and a copy of its initial weights."""
    model = small_model(case)
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def train_two_steps(cell: Cell) -> None:
    model, weights = start_of(cell.case)
    model.load_state_dict(weights)
    criterion = build_criterion(recipe_of(cell))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for counts in ((3, 2), (4, 0)):
        pixels = torch.randn(2, 3, *IMAGE_SIZE, generator=generator)
        targets = make_targets(counts)
        groups = model(pixel_values=pixels, targets=targets).groups
        output = criterion(groups, targets)
        optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        assert {name: loss for name, loss in output.losses.items() if not loss.isfinite()} == {}
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        wrong = [n for n, grad in trained.items() if grad is None or not grad.isfinite().all()]
        assert wrong == []
        assert any(grad.any() for grad in trained.values() if grad is not None)
        optimizer.step()
        pairs = output.assignments["decoder"][-1]
        assert len(pairs.classes) or cell.assigner in MAY_LEAVE_ALL_OUT
        assert pairs.boxes.target.numel() == 0 or int(pairs.boxes.target.max()) < len(targets)


# random boxes need not fit any object
MAY_LEAVE_ALL_OUT = ("cross_stage", "iou", "restricted")


def named(cell: Cell) -> str:
    return "-".join(cell)


@pytest.mark.parametrize("cell", SAMPLE, ids=named)
def test_a_sample_of_the_matrix_trains_two_steps(cell: Cell) -> None:
    train_two_steps(cell)


def test_the_sample_holds_every_part() -> None:
    assert {cell.assigner for cell in SAMPLE} == set(ASSIGNERS)
    assert {cell.class_loss for cell in SAMPLE} == set(CLASS_LOSSES)
    assert {cell.case for cell in SAMPLE} == set(CASES)
    assert {CASES[cell.case][0] for cell in SAMPLE} == set(HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_cell_of_the_matrix_trains_two_steps(case: str) -> None:
    chosen = [cell for cell in CELLS if cell.case == case]
    assert len(chosen) == len(ASSIGNERS) * len(CLASS_LOSSES)
    for cell in chosen:
        try:
            train_two_steps(cell)
        except Exception as error:
            raise AssertionError(named(cell)) from error


HIDDEN = {"hybrid_queries": 4, "query_groups": 3, "recollect_queries": True}
# all compatible passes on each head: settings of the model, groups by assigner
PASSES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "stageinteractor": (
        "stageinteractor",
        {**HIDDEN, "max_reused_filters": 0, "reuse_spatial_filters": False},
        {},
    ),
    **{
        f"{case}_alone": (
            case,
            {**HIDDEN, "without_self_attention": True},
            {"no_self_attention": "one_to_many"},
        )
        for case in CASES
        if case != "stageinteractor"
    },
    **{
        f"{case}_branch": (
            case,
            {**HIDDEN, "one_to_many_branch": True},
            {"one_to_many": "one_to_many"},
        )
        for case in CASES
        if case != "stageinteractor"
    },
}


def with_passes(case: str, settings: dict[str, Any], assigners: dict[str, str]) -> Criterion:
    head, model = CASES[case]
    groups = {"hybrid": "repeated", "group": "hungarian", "recollected": "simota", **assigners}
    return build_criterion(
        Recipe(
            head=head,
            model={**model, **settings},
            groups={name: GroupSettings(AssignerSettings(part)) for name, part in groups.items()},
        )
    )


def small_batch(count: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    label = {
        "class_labels": torch.randint(4, (count,), generator=generator),
        "boxes": make_boxes(count, generator=generator),
        "image_id": torch.tensor([seed]),
    }
    return {
        "pixel_values": torch.randn(1, 3, *IMAGE_SIZE, generator=generator),
        "pixel_mask": torch.ones(1, *IMAGE_SIZE, dtype=torch.int64),
        "labels": [label],
    }


def two_steps_with_every_pass() -> None:
    """The second process has no objects in the first step; an unused parameter ends the second."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    for case, settings, assigners in PASSES.values():
        model = small_model(case, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
        criterion = with_passes(case, settings, assigners)
        update = Updater(accelerator, prepared, criterion, prepared_optimizer, clip_norm=0.1)
        for step in range(2):
            result = update([small_batch(3 * (1 - rank) + step, seed=2 * step + rank)])
            assert torch.isfinite(result.total)


@pytest.mark.slow
def test_no_parameter_is_unused_with_every_pass_over_two_processes() -> None:
    in_processes(two_steps_with_every_pass, seconds=240)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python benchmarks/target_matrix.py"


def test_the_page_counts_only_what_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(cell: Cell) -> Recipe:
        recipe = recipe_of(cell)
        loss = {**recipe.loss, "class_divisor": "targets"}  # which the softmax loss rejects
        return replace(recipe, loss=loss)

    monkeypatch.setattr("target_matrix.recipe_of", refused)
    name, *counts = next(assigner_rows())
    assert name == "`hungarian`"
    assert counts == [f"{len(CLASS_LOSSES) - 1} of {len(CLASS_LOSSES)}"] * len(CASES)
