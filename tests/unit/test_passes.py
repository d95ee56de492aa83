"""Decoder passes: other query sets, and other runs of the decoder's own queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.structures import StageGroup
from detrelay.heads import HEADS
from factories import SMALL_HEADS, make_targets, small_head_config
from tiny_run import shrink_backbone

DEFORMABLE_CASES = (
    "deformable_detr",
    "deformable_detr_two_stage",
    "dn_detr",
    "dino",
)
STAGES, QUERIES = 3, 8
PASSES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
    # settings; stages and queries of the groups that they add
    "hybrid": ({"hybrid_queries": 5}, {"hybrid": (STAGES, 5)}),
    "groups": (
        {"query_groups": 3},
        {"group/1": (STAGES, QUERIES), "group/2": (STAGES, QUERIES)},
    ),
    "no_self_attention": (
        {"without_self_attention": True},
        {"no_self_attention": (STAGES, QUERIES)},
    ),
    "recollected": ({"recollect_queries": True}, {"recollected": (1 + 2, QUERIES)}),
    "one_to_many": ({"one_to_many_branch": True}, {"one_to_many": (STAGES, QUERIES)}),
    "all": (
        {"hybrid_queries": 5, "query_groups": 2, "without_self_attention": True}
        | {"recollect_queries": True},
        {"hybrid": (STAGES, 5), "group/1": (STAGES, QUERIES)}
        | {"no_self_attention": (STAGES, QUERIES), "recollected": (3, QUERIES)},
    ),
}
CASES = [
    *((case, kind) for case in DEFORMABLE_CASES for kind in PASSES),
    *(("stageinteractor", kind) for kind in ("hybrid", "groups", "recollected")),
]
# queries that skip a stage have no filters from it
WITHOUT_REUSE = {"max_reused_filters": 0, "reuse_spatial_filters": False}
SHARED_SLOTS = {"no_self_attention", "recollected", "one_to_many"}


@pytest.fixture(scope="module", autouse=True)
def small_backbone() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        shrink_backbone(patch)
        yield


def build(case: str, **changes: Any) -> DetectorForObjectDetection:
    """A model in float64 whose weights depend on their names alone."""
    if case == "stageinteractor":
        changes = {"num_stages": STAGES, **WITHOUT_REUSE, **changes}
    config = small_head_config(case, backbone_norm="eval", **changes)
    model = HEADS[SMALL_HEADS[case][0]].model(config).double()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        noise = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        is_norm = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1 + noise if is_norm else noise
    return model


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)


def train_groups(model: DetectorForObjectDetection) -> dict[str, StageGroup]:
    torch.manual_seed(1)  # of the denoising noise
    groups = model.train()(pixel_values=pixels(), targets=make_targets()).groups
    assert groups is not None
    assert groups[0].name == "decoder"
    return {group.name: group for group in groups}


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_a_pass_adds_its_groups_and_leaves_the_others_as_they_are(case: str, kind: str) -> None:
    settings, added = PASSES[kind]
    model, plain = build(case, **settings), build(case)
    if kind == "one_to_many":  # other layers: the decoder itself differs
        plain = model
    groups, before = train_groups(model), train_groups(plain)
    assert set(groups) == set(before) | set(added)
    for name, (stages, queries) in added.items():
        group = groups[name]
        assert [stage.logits.shape for stage in group.stages] == [(2, queries, 4)] * stages
        assert group.slot_space == ("decoder" if name in SHARED_SLOTS else name)
    for name, group in before.items():
        for stage, expected in zip(groups[name].stages, group.stages, strict=True):
            torch.testing.assert_close(stage.logits, expected.logits, atol=1e-10, rtol=0)
            torch.testing.assert_close(stage.boxes, expected.boxes, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_every_parameter_learns_and_evaluation_runs_the_decoder_alone(case: str, kind: str) -> None:
    model = build(case, **PASSES[kind][0])
    total = sum(
        (stage.logits.square().sum() + stage.boxes.square().sum())
        for group in train_groups(model).values()
        for stage in group.stages
    )
    assert isinstance(total, Tensor)
    total.backward()
    silent = [
        name
        for name, parameter in model.head.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert not silent
    sizes = []
    for name, module in model.head.named_modules():
        if name.endswith(("self_attention_norm", ".attention_norm")) and "encoder" not in name:
            module.register_forward_hook(lambda _m, args, _o: sizes.append(args[0].shape[1]))
    with torch.no_grad():
        model.eval()(pixel_values=pixels())
    assert sizes == [QUERIES] * STAGES


def test_sets_of_queries_do_not_see_each_other() -> None:
    groups = []
    for change in (0.0, 3.0):
        model = build("dino", hybrid_queries=5, query_groups=2)
        model.head.set_content[0].weight.data += change
        groups.append(train_groups(model))
    before, after = groups
    moved = {
        name: (before[name].stages[-1].logits - after[name].stages[-1].logits).abs().max().item()
        for name in before
    }
    assert moved.pop("hybrid") > 1e-3
    assert max(moved.values()) < 1e-10


def test_six_stages_recollect_as_many_sets_as_published() -> None:
    model = build("dino_without_denoising", decoder_layers=6, recollect_queries=True)
    assert len(train_groups(model)["recollected"].stages) == (2 + 3 + 5 + 8 + 13) - 5


def test_recollected_queries_skip_a_stage() -> None:
    """The first: what the decoder starts from, refined by its second stage."""
    model = build("deformable_detr_refine", recollect_queries=True)
    recollected = train_groups(model)["recollected"].stages
    head = model.head
    head.layers[0], head.classify[0], head.refine[0] = (
        head.layers[1],
        head.classify[1],
        head.refine[1],
    )
    first = train_groups(model)["decoder"].stages[0]
    torch.testing.assert_close(recollected[0].logits, first.logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(recollected[0].boxes, first.boxes, atol=1e-10, rtol=0)


def test_the_run_without_self_attention_parts_ways_after_the_first_stage() -> None:
    groups = train_groups(build("deformable_detr_refine", without_self_attention=True))
    own, alone = groups["decoder"].stages, groups["no_self_attention"].stages
    torch.testing.assert_close(own[0].logits, alone[0].logits, atol=1e-10, rtol=0)
    assert (own[1].logits - alone[1].logits).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["deformable_detr", "dino"])
def test_the_run_without_self_attention_is_assigned_by_the_decoders_boxes(case: str) -> None:
    model = build(case, without_self_attention=True)
    groups = train_groups(model)
    facts = {fact.name: fact for fact in model.config.stage_groups()}
    assert facts["no_self_attention"].references
    pairs = zip(groups["no_self_attention"].stages, groups["decoder"].stages, strict=True)
    for alone, own in pairs:
        assert torch.equal(alone.references, own.boxes)
        assert not alone.references.requires_grad


def test_the_branch_reads_before_self_attention() -> None:
    """Another query's content moves the decoder's first stage, but not that of the branch."""
    groups = []
    for change in (0.0, 3.0):
        model = build("deformable_detr", one_to_many_branch=True)
        model.head.queries.weight.data[0] += change
        groups.append(train_groups(model))
    branch, own = (
        (groups[0][name].stages[0].logits - groups[1][name].stages[0].logits)[:, 1:].abs().max()
        for name in ("one_to_many", "decoder")
    )
    assert branch < 1e-10
    assert own > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hybrid_queries": -1}, "hybrid_queries must be >= 0; found -1"),
        ({"query_groups": 0}, "query_groups must be at least 1; found 0"),
        (
            {"without_self_attention": True, "one_to_many_branch": True},
            "without_self_attention runs layers that begin with self-attention",
        ),
    ],
)
def test_incompatible_passes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        small_head_config("dino", **settings)


def test_filters_of_a_stage_that_was_skipped_cannot_be_reused() -> None:
    with pytest.raises(StrictDataclassError, match="set max_reused_filters to 0"):
        small_head_config("stageinteractor", recollect_queries=True)
