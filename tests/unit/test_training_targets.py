"""Assigners, costs, losses and groups as recipes name them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detrelay.apps.training_targets import build_criterion
from detrelay.assigners import (
    CrossStageAssigner,
    HungarianAssigner,
    IoUAssigner,
    RankWeightedAssigner,
    RepeatedAssigner,
    UnionAssigner,
)
from detrelay.assigners.costs import (
    FocalClassCost,
    GIoUBoxCost,
    HighOrderCost,
    L1BoxCost,
    TimedCost,
    default_costs,
)
from detrelay.core.class_losses import MatchabilityClassLoss, PositionSupervisedClassLoss
from detrelay.core.errors import RecipeError
from detrelay.core.loss_terms import Divisor
from detrelay.core.losses import FocalClassLoss, GIoUBoxLoss, L1BoxLoss
from detrelay.core.recipes.recipe import Recipe, load_recipe
from detrelay.heads import HEADS
from factories import make_stages, make_targets, small_head_config


def recipe(text: str, tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


DINO = 'head = "dino"\n'
GROUPS = 'head = "deformable_detr"\n[model]\nquery_groups = 4\n[groups.group]\nweight = 0.5\n'
UNION_UNDER_LABELS = """
head = "dino"
[assigner]
name = "cross_stage"
options = {keep_own = true}
[assigner.base]
name = "union"
costs = ["focal:3", {name = "high_order", weight = 1, power = 2, start = 0.75}]
[loss]
class_loss = "matchability"
class_weight = 1
class_divisor = "targets"
[groups.proposals]
weight = 0.5
loss = {class_loss = "focal", l1_divisor = "targets*2"}
[groups.denoising]
weight = 0.25
"""


def test_a_recipe_says_everything(tmp_path: Path) -> None:
    read = recipe(UNION_UNDER_LABELS, tmp_path)
    assert Recipe.from_mapping(read.to_mapping(), "again") == read
    (tmp_path / "again.toml").write_text(read.to_toml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.toml") == read
    criterion = build_criterion(read)
    decoder = criterion.assigners["decoder"]
    assert isinstance(decoder, CrossStageAssigner)
    assert decoder.keep_own
    assert isinstance(decoder.base, UnionAssigner)
    assert isinstance(decoder.base.base, HungarianAssigner)
    focal, late = decoder.base.base.costs
    assert focal == FocalClassCost(weight=3, epsilon=1e-8)
    assert late == TimedCost(HighOrderCost(1, 2, 1e-6), 0.75, 1, criterion.progress)
    epsilon = HEADS["dino"].model.loss_config.giou_epsilon
    assert criterion.terms == (
        MatchabilityClassLoss(1, epsilon=epsilon, divisor=Divisor("targets")),
        L1BoxLoss(5),
        GIoUBoxLoss(2, epsilon),
    )
    own = criterion.terms_of("proposals")
    assert own[0] == FocalClassLoss(1, divisor=Divisor("targets"))
    assert own[1] == L1BoxLoss(5, divisor=Divisor("targets", 2))
    assert criterion.terms_of("denoising") == criterion.terms
    assert criterion.group_weights == {"proposals": 0.5, "denoising": 0.25}
    assert isinstance(criterion.assigners["proposals"], HungarianAssigner)


def test_overrides_reach_nested_tables(tmp_path: Path) -> None:
    read = recipe(
        DINO,
        tmp_path,
        "assigner.base.name=repeated",
        "assigner.base.options.times=3",
        "assigner.name=rank_weighted",
        'assigner.costs=["focal:1", "l1:2"]',
        "groups.denoising.weight=0.5",
        "groups.denoising.loss.giou_weight=3",
        "loss.class_loss=position_supervised",
        "loss.class_options.power=1.5",
    )
    criterion = build_criterion(read)
    decoder = criterion.assigners["decoder"]
    assert isinstance(decoder, RankWeightedAssigner)
    assert isinstance(decoder.base, RepeatedAssigner)
    assert decoder.base.times == (3,)
    assert decoder.base.costs == (FocalClassCost(1, epsilon=1e-8), L1BoxCost(2))
    assert isinstance(criterion.terms[0], PositionSupervisedClassLoss)
    assert criterion.terms[0].power == 1.5
    assert criterion.terms_of("denoising")[2].weight == 3


def test_defaults_are_as_published() -> None:
    for name, entry in HEADS.items():
        criterion = build_criterion(Recipe(head=name))
        loss = entry.model.loss_config
        assert criterion.terms == loss.terms()
        assert criterion.terms[:3] == (
            FocalClassLoss(loss.class_weight),
            L1BoxLoss(5, loss.l1_format),
            GIoUBoxLoss(2, loss.giou_epsilon),
        )
        decoder: Any = criterion.assigners["decoder"]
        assert type(decoder).__name__.lower().startswith(entry.assigner.replace("_", ""))
        assert getattr(decoder, "base", decoder).costs == default_costs(loss)
        assert criterion.group_weights == criterion.group_terms == criterion.joins == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            DINO + "[groups.hybrid]\nweight = 2",
            "groups.hybrid: head dino has no such group of stages with these settings; it has "
            "decoder, proposals, denoising",
        ),
        (
            DINO + "model = {denoising_groups = 0}\n[groups.denoising]\nweight = 2",
            "it has decoder, proposals",
        ),
        (
            DINO + '[groups.denoising]\nassigner = {name = "one_to_many"}',
            "groups.denoising: which query learns which object is known by construction",
        ),
        (
            DINO + '[groups.decoder]\nassigner = {name = "union"}',
            "groups.decoder: its assigner is set in the table assigner",
        ),
        (
            'head = "deformable_detr"\nmodel = {two_stage = true, box_refinement = true}\n'
            '[groups.proposals]\njoins = "decoder"\n[assigner]\nname = "cross_stage"',
            "group 'proposals' cannot join 'decoder': they share no slots",
        ),
        (
            DINO + '[groups.proposals]\njoins = "decodr"',
            "groups.proposals.joins: unknown group decodr",
        ),
        (
            DINO + '[groups.proposals]\njoins = "denoising"',
            "groups.proposals.joins: denoising has no assigner to join",
        ),
        (
            DINO + '[groups.proposals]\njoins = "decoder"\nassigner = {name = "union"}',
            "groups.proposals: it joins decoder, whose assigner serves both",
        ),
        (
            DINO + '[loss]\nclass_loss = "matchability"\nl1_weight = 0\ngiou_weight = 0',
            "class loss 'matchability' needs the overlap of boxes, but l1_weight and giou_weight",
        ),
        (
            DINO + '[loss]\nclass_loss = "softmax"\nclass_divisor = "targets"',
            "class_divisor: the softmax loss is divided by the sum of its own weights",
        ),
        (
            DINO + '[assigner]\nname = "cross_stage"\nbase = {name = "rank_weighted"}',
            "assigner 'cross_stage': base: a label from another stage has no rank",
        ),
        (
            'head = "deformable_detr"\n[assigner]\nname = "iou"\noptions = {boxes = "initial"}',
            "the assigner of group decoder needs the boxes that stages started from",
        ),
        (
            DINO + '[assigner]\nname = "iou"\ncosts = ["l1:5"]',
            "assigner 'iou' takes no costs; remove them",
        ),
        (
            DINO + '[assigner]\nname = "iou"\nbase = {name = "union"}',
            "assigner 'iou' takes no base; remove it",
        ),
        (
            DINO + '[assigner]\nname = "iou"\noptions = {treshold = 1}',
            "assigner 'iou' has no option 'treshold'; did you mean 'threshold'?",
        ),
        (
            GROUPS,
            "groups.group/1: head deformable_detr has this group of stages, and nothing assigns it",
        ),
        (
            GROUPS.replace("query_groups = 4", "query_groups = 1"),
            "groups.group: head deformable_detr has no such group of stages with these settings",
        ),
        (DINO + '[assigner]\ncosts = ["foca:2"]', "unknown cost 'foca'; did you mean 'focal'?"),
        (DINO + "[assigner]\ncosts = [2]", 'a cost must be "name", "name:weight" or a table'),
        (
            DINO + '[assigner]\ncosts = [{name = "l1", start = 2}]',
            "cost 'l1': start and end must lie in [0, 1], found 2",
        ),
        (DINO + '[loss]\nclass_loss = "varifocl"', "did you mean 'varifocal'?"),
        (
            DINO + '[loss]\nclass_loss = "varifocal"\nclass_options = {gama = 1}',
            "class loss 'varifocal' has no option 'gama'; did you mean 'gamma'?",
        ),
        (DINO + '[loss]\nl1_divisor = "boxes"', "a divisor must be targets, pairs, larger"),
        (
            DINO + "[groups.proposals]\nloss = {giou = 1}",
            "unknown key groups.proposals.loss.giou; did you mean "
            "groups.proposals.loss.giou_weight?",
        ),
        (
            DINO + '[loss]\nextra_losses = ["nowhere_to_be_found:Loss"]',
            "loss 'nowhere_to_be_found:Loss': No module named 'nowhere_to_be_found'",
        ),
    ],
)
def test_wrong_combinations_are_refused_in_one_line(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        build_criterion(recipe(text, tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_proposals_may_join_the_decoder_where_they_share_slots(tmp_path: Path) -> None:
    text = DINO + '[assigner]\nname = "union"\n[groups.proposals]\njoins = "decoder"'
    criterion = build_criterion(recipe(text, tmp_path))
    assert criterion.joins == {"proposals": "decoder"}
    assert list(criterion.assigners) == ["decoder"]


def test_one_table_serves_all_groups_of_a_name(tmp_path: Path) -> None:
    text = (
        GROUPS
        + """
        assigner = {name = "repeated", options = {times = 2}}
        loss = {class_weight = 3}
        [groups."group/2"]
        weight = 0.25
        assigner = {name = "simota"}
        """
    )
    criterion = build_criterion(recipe(text, tmp_path))
    kinds = {name: type(part).__name__ for name, part in criterion.assigners.items()}
    assert kinds["group/1"] == kinds["group/3"] == "RepeatedAssigner"
    assert kinds["group/2"] == "SimOtaAssigner"
    assert criterion.group_weights == {"group/1": 0.5, "group/2": 0.25, "group/3": 0.5}
    weights = [criterion.terms_of(f"group/{index}")[0].weight for index in (1, 2, 3)]
    assert weights == [3, 2, 3]


OWN = """
from detrelay.assigners import IoUAssigner

class Near(IoUAssigner):
    def __init__(self, threshold=0.2, progress=None):
        super().__init__(threshold)
        self.progress = progress

class FlatCost:
    def __init__(self, weight=1.0, height=2.0):
        self.weight, self.height = weight, height

    def __call__(self, prediction, targets):
        return self.weight * self.height + 0 * prediction.boxes[targets.image, :, 0]

class SizeLoss:
    name = "size"

    def __init__(self, weight=1.0):
        self.weight = weight

    def __call__(self, prediction, targets, assignment, normalizers):
        return prediction.boxes[..., 2:].sum() / normalizers.boxes

class HingeClassLoss(SizeLoss):
    name = "class"

    def __call__(self, prediction, targets, assignment, normalizers):
        return prediction.logits.clamp(min=0).sum() / normalizers.classes
"""


def test_custom_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_targets.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_targets", raising=False)
    read = recipe(
        DINO
        + """
        [assigner]
        name = "own_targets:Near"
        options = {threshold = 0.3}
        [groups.proposals.assigner]
        costs = ["own_targets:FlatCost:3", {name = "own_targets:FlatCost", height = 5}]
        [loss]
        class_loss = "own_targets:HingeClassLoss"
        extra_losses = ["own_targets:SizeLoss:7"]
        """,
        tmp_path,
    )
    criterion = build_criterion(read)
    near: Any = criterion.assigners["decoder"]
    assert isinstance(near, IoUAssigner)
    assert near.threshold == 0.3
    assert near.progress is criterion.progress
    proposals: Any = criterion.assigners["proposals"]
    stages, targets = make_stages(stages=1), make_targets()
    assert [cost(stages[0], targets)[0, 0].item() for cost in proposals.costs] == [6, 5]
    assert [(term.name, term.weight) for term in criterion.terms] == [
        ("class", 1),
        ("l1", 5),
        ("giou", 2),
        ("size", 7),
    ]


def test_costs_follow_the_progress_of_training(tmp_path: Path) -> None:
    text = (
        DINO
        + """
    [assigner]
    costs = [{name = "giou", weight = 2, end = 0.75}, {name = "high_order", start = 0.75}]
    """
    )
    criterion = build_criterion(recipe(text, tmp_path))
    costs: Any = criterion.assigners["decoder"].costs  # type: ignore[attr-defined]
    stages, targets = make_stages(stages=1), make_targets()
    early, late = GIoUBoxCost(2, 1e-6), HighOrderCost(epsilon=1e-6)
    for share, active in ((0.0, early), (0.7, early), (0.75, late), (1.0, late)):
        criterion.progress.share = share
        found = torch.stack([cost(stages[0], targets) for cost in costs]).sum(0)
        assert torch.equal(found, active(stages[0], targets)), share


@pytest.mark.parametrize("counts", [(3, 2), (0, 0)])
def test_a_head_learns_by_a_recipe(counts: tuple[int, int], tmp_path: Path) -> None:
    text = UNION_UNDER_LABELS.replace("[groups.proposals]", '[groups.proposals]\njoins = "decoder"')
    criterion = build_criterion(recipe(text, tmp_path))
    model = HEADS["dino"].model(small_head_config("dino")).train()
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    targets = make_targets(counts)
    criterion.progress.share = 0.9
    groups = model(pixel_values=pixels, targets=targets).groups
    assert groups is not None
    output = criterion(groups, targets)
    output.total.backward()
    assert torch.isfinite(output.total)
    for name, parameter in model.head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    boxes = {len(a.boxes) for name in ("decoder", "proposals") for a in output.assignments[name]}
    assert len(boxes) == 1
    assert boxes.pop() >= len(targets)
