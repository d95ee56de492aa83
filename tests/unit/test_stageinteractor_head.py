"""The head's options: each changes what it says, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from detrelay.core.structures import StageGroup
from detrelay.heads.stageinteractor.geometry import grid_boxes
from detrelay.heads.stageinteractor.head import StageInteractorHead
from detrelay.heads.stageinteractor.mixing import FilterBank
from factories import make_pyramid, small_config


def make_head(seed: int = 0, **changes: Any) -> StageInteractorHead:
    """A head whose weights are all random: none of its paths starts at zero."""
    torch.manual_seed(seed)
    head = StageInteractorHead(small_config(**changes))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head.eval()


def last_logits(head: StageInteractorHead, **pyramid: Any) -> Tensor:
    with torch.no_grad():
        (group,) = head(make_pyramid(**pyramid))
    return group.stages[-1].logits


def names(head: StageInteractorHead) -> set[str]:
    return {name for name, _ in head.named_parameters()}


def test_group_has_all_stages_and_starts_as_the_whole_image() -> None:
    head = StageInteractorHead(small_config())  # fresh: boxes stay where they are
    (group,) = head(make_pyramid(height=64, width=96))
    assert isinstance(group, StageGroup)
    assert group.name == "decoder"
    assert len(group.stages) == 4
    for stage in group.stages:
        assert stage.logits.shape == (2, 8, 4)
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(2, 8, 4)
        torch.testing.assert_close(stage.boxes, whole)


def test_queries_may_start_in_a_grid() -> None:
    head = StageInteractorHead(small_config(initial_boxes="grid"))
    (group,) = head(make_pyramid(height=64, width=96))
    grid = grid_boxes(8, torch.zeros(())).expand(2, 8, 4)
    for stage in group.stages:
        torch.testing.assert_close(stage.boxes, grid)


def test_inference_gives_what_training_gives() -> None:
    # without gradients the LayerNorm runs in place
    head = make_head().double()
    pyramid = make_pyramid()
    pyramid = replace(pyramid, levels=tuple(level.double() for level in pyramid.levels))
    (trained,) = head(pyramid)
    with torch.no_grad():
        (inferred,) = head(pyramid)
    for ours, theirs in zip(inferred.stages, trained.stages, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-11, rtol=0)
        torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-11, rtol=0)


def test_initialisation_of_the_specification() -> None:
    head = StageInteractorHead(small_config())
    stage = head.stages[3]
    assert torch.all(stage.classify.out.bias == -4.59511985013459)
    assert stage.refine.out.weight.abs().sum() == 0
    assert stage.mixing.generator.weight.abs().sum() == 0
    assert stage.mixing.generator.bias.abs().sum() > 0
    assert stage.mixing.channel_gates.bias.abs().sum() == 0
    assert all(p.abs().sum() == 0 for p in stage.mixing.adapters.parameters())
    base = stage.points.base.bias.view(-1, 3)
    assert base[:, 2].abs().sum() == 0
    assert 0.3 < base[:, :2].abs().max() <= 0.5
    inner = stage.points.inner.bias.view(-1, 3)
    assert inner[0].abs().sum() == 0
    assert inner[1:, :2].abs().sum() > 0
    assert 0 <= stage.attention.overlap_scale.min() <= stage.attention.overlap_scale.max() <= 4


@pytest.mark.parametrize(
    ("limit", "per_stage"), [(None, [0, 0, 1, 2]), (1, [0, 0, 1, 1]), (0, [0, 0, 0, 0])]
)
def test_number_of_reused_filters(limit: int | None, per_stage: list[int]) -> None:
    head = make_head(max_reused_filters=limit)
    assert [len(stage.mixing.adapters) for stage in head.stages] == per_stage
    assert torch.isfinite(last_logits(head)).all()


def test_bank_holds_the_filters_of_earlier_stages_but_not_of_the_first() -> None:
    head = make_head()
    banks: list[FilterBank] = []
    for stage in head.stages:
        stage.mixing.register_forward_hook(lambda _m, args, _o: banks.append(args[2]))
    last_logits(head)
    assert [len(entry.channel) for entry in banks] == [0, 0, 1, 2]


def test_baseline_of_table_6_has_no_bank_no_gates_and_no_biases() -> None:
    baseline = make_head(max_reused_filters=0, reuse_spatial_filters=False)
    kinds = ("adapters", "gate", "channel_biases", "bias_generator")
    assert not [name for name in names(baseline) if any(kind in name for kind in kinds)]
    rows = [stage.mixing.shape.own_patterns for stage in baseline.stages]
    assert rows == [8, 8, 8, 8]
    assert torch.isfinite(last_logits(baseline)).all()


def test_spatial_reuse_halves_the_own_patterns() -> None:
    head = make_head()
    assert [stage.mixing.shape.own_patterns for stage in head.stages] == [8, 8, 4, 4]


@pytest.mark.parametrize("adapter", ["channel", "none"])
def test_adapter_kinds_change_the_result(adapter: str) -> None:
    head = make_head(adapter=adapter)
    released = make_head()
    adapters = [name for name in names(head) if ".adapters." in name]
    assert bool(adapters) == (adapter == "channel")
    state = {k: v for k, v in head.state_dict().items() if ".adapters." not in k}
    released.load_state_dict(state, strict=False)
    assert not torch.allclose(last_logits(head), last_logits(released))


def test_one_step_sampling_predicts_every_point() -> None:
    head = make_head(two_step_sampling=False)
    assert not [name for name in names(head) if ".points.inner." in name]
    # 3 numbers x 2 groups x (2 base points x 2 points of the pattern)
    assert head.stages[1].points.base.out_features == 3 * 2 * 4
    assert torch.isfinite(last_logits(head)).all()


def first_boxes(head: StageInteractorHead) -> Tensor:
    with torch.no_grad():
        (group,) = head(make_pyramid())
    return group.stages[0].boxes


def test_centers_move_by_size_or_by_scale() -> None:
    by_size, by_scale = first_boxes(make_head()), first_boxes(make_head(center_unit="scale"))
    torch.testing.assert_close(by_size[..., 2:], by_scale[..., 2:])
    # of an image of 96 x 64 pixels: a step is sqrt(96 * 64) instead of 96 and 64
    moved = (by_size - 0.5)[..., :2] * torch.tensor([(64 / 96) ** 0.5, (96 / 64) ** 0.5])
    torch.testing.assert_close(moved, (by_scale - 0.5)[..., :2])


def test_finest_scale_shifts_what_points_read_and_where_new_ones_start() -> None:
    shifted, released = make_head(finest_scale=2), make_head()
    assert not torch.allclose(last_logits(shifted), last_logits(released))
    # new points of one step read the same levels
    one_step = [make_head(finest_scale=scale, two_step_sampling=False) for scale in (2, 3)]
    for head in one_step:
        torch.manual_seed(1)
        for stage in head.stages:
            stage.points.reset_parameters()
    torch.testing.assert_close(last_logits(one_step[0]), last_logits(one_step[1]))


def test_fewer_levels_are_read() -> None:
    head = make_head()
    assert last_logits(head).shape == (2, 8, 4)
    pyramid = make_pyramid()
    fewer = replace(pyramid, levels=pyramid.levels[:2], strides=(4, 8), valid=pyramid.valid[:2])
    with torch.no_grad():
        assert not torch.allclose(head(fewer)[0].stages[-1].logits, last_logits(head))


def test_work_in_place_without_gradients_does_not_change_the_numbers() -> None:
    head = make_head().double()
    pyramid = make_pyramid()
    pyramid = replace(pyramid, levels=tuple(level.double() for level in pyramid.levels))
    with_gradients = head(pyramid)[0].stages[-1]
    with torch.no_grad():
        without = head(pyramid)[0].stages[-1]
    torch.testing.assert_close(without.logits, with_gradients.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(without.boxes, with_gradients.boxes, atol=1e-10, rtol=0)


def test_box_losses_do_not_reach_earlier_boxes() -> None:
    head = make_head().train()
    (group,) = head(make_pyramid())
    group.stages[1].boxes.sum().backward()
    assert head.stages[0].refine.out.weight.grad is None
    # but they do reach earlier filters and queries
    assert head.stages[0].mixing.generator.weight.grad is not None


def test_gradients_of_late_stages_reach_the_generators_of_earlier_ones() -> None:
    head = make_head().train()
    (group,) = head(make_pyramid())
    group.stages[3].logits.sum().backward()
    grad = head.stages[1].mixing.generator.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0
