"""Parameter groups and the learning rate at given steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detrelay.core.engine.optimizer import (
    build_optimizer,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)
from detrelay.core.recipes.recipe import TrainConfig


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"conv": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
        self.head = nn.Linear(2, 2)


def names_of(model: nn.Module, group: dict[str, object]) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_one_group_with_decay_on_everything_by_default() -> None:
    groups = parameter_groups(Model(), TrainConfig())
    assert len(groups) == 1
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (2.5e-5, 1e-4)
    assert len(groups[0]["params"]) == 6


def test_multipliers_multiply_and_named_parts_are_not_decayed() -> None:
    model = Model()
    settings = TrainConfig(
        learning_rate=1.0,
        weight_decay=0.5,
        lr_multipliers={"backbone": 0.1, "norm": 0.5},
        no_decay=("norm", "head.bias"),
    )
    found = {
        (group["lr"], group["weight_decay"]): names_of(model, group)
        for group in parameter_groups(model, settings)
    }
    assert found == {
        (0.1, 0.5): {"backbone.conv.weight", "backbone.conv.bias"},
        (0.05, 0.0): {"backbone.norm.weight", "backbone.norm.bias"},
        (1.0, 0.5): {"head.weight"},
        (1.0, 0.0): {"head.bias"},
    }


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.backbone.requires_grad_(False)
    (group,) = parameter_groups(model, TrainConfig())
    assert names_of(model, group) == {"head.weight", "head.bias"}
    # a rate of the backbone is then unused, but every published recipe has one
    for settings in (TrainConfig(lr_multipliers={"backbone": 0.1}), TrainConfig(layer_decay=0.5)):
        (again,) = parameter_groups(model, settings)
        assert again == group
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        parameter_groups(model, TrainConfig())


def test_a_misspelled_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.no_decay: 'nrom' is part of no parameter"):
        parameter_groups(Model(), TrainConfig(no_decay=("nrom",)))


def test_published_schedule_at_given_steps() -> None:
    settings = TrainConfig()  # 500 steps of warm-up from 0.001, drops after epochs 8 and 11
    expected = {0: 0.001, 250: 0.5005, 499: 0.998002, 500: 1.0, 7999: 1.0, 8000: 0.1, 11000: 0.01}
    for step, factor in expected.items():
        assert learning_rate_factor(step, 1000, settings) == pytest.approx(factor, rel=1e-12)


def test_a_drop_within_the_warm_up_scales_it() -> None:
    settings = TrainConfig(milestones=(1,), warmup_steps=100, warmup_factor=0.0)
    assert learning_rate_factor(50, 10, settings) == pytest.approx(0.05)


def test_no_warm_up() -> None:
    assert learning_rate_factor(0, 10, TrainConfig(warmup_steps=0)) == 1.0


def test_every_group_is_scaled_from_its_own_base() -> None:
    settings = TrainConfig(learning_rate=1.0, lr_multipliers={"head": 0.5})
    optimizer = build_optimizer(Model(), settings)
    set_learning_rate(optimizer, 0.1)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_first_update_of_a_tiny_gradient_is_a_full_one() -> None:
    """AdamW moves by the learning rate even where a usual epsilon would hold it back."""
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.0))
    model.weight.grad = torch.full((1, 1), 1e-8)
    optimizer.step()
    assert (before - model.weight).item() == pytest.approx(0.1 / 1.01, rel=1e-3)


def test_stars_in_keys_match_any_characters() -> None:
    model = Model()
    settings = TrainConfig(
        learning_rate=1.0, weight_decay=0.5, no_decay=("backbone*norm", "head*s")
    )
    found = {
        group["weight_decay"]: names_of(model, group) for group in parameter_groups(model, settings)
    }
    assert found[0.0] == {"backbone.norm.weight", "backbone.norm.bias", "head.bias"}
    with pytest.raises(ValueError, match=r"train.no_decay: 'norm\*backbone' is part of no param"):
        parameter_groups(model, TrainConfig(no_decay=("norm*backbone",)))


def test_epsilon_of_the_recipe_holds_tiny_gradients_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    settings = TrainConfig(learning_rate=0.1, weight_decay=0.0, adam_epsilon=1e-8)
    optimizer = build_optimizer(model, settings)
    model.weight.grad = torch.full((1, 1), 1e-8)
    optimizer.step()
    assert (before - model.weight).item() == pytest.approx(0.1 / 2, rel=1e-3)


class Staged(nn.Module):
    """Parameters named as by a ResNet of torchvision (`stem`, `layers`) or a Swin."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            *parents, last = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.register_parameter(last, nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize(
    ("expected"),
    [
        {
            "backbone.conv1.weight": 0.5**5,
            "backbone.layer1.0.conv2.weight": 0.5**4,
            "backbone.layer3.11.bn1.bias": 0.5**2,
            "backbone.layer4.2.conv1.weight": 0.5,
            "neck.convs.0.weight": 1.0,
            "head.layers.1.weight": 1.0,
        },
        {
            "backbone.swin.embeddings.norm.weight": 0.5**5,
            "backbone.swin.encoder.layers.0.blocks.1.mlp.fc1.weight": 0.5**4,
            "backbone.swin.encoder.layers.3.blocks.0.mlp.fc1.weight": 0.5,
            "backbone.hidden_states_norms.stage2.weight": 0.5**3,
            "head.stages.2.weight": 1.0,
        },
    ],
)
def test_layer_decay_counts_backbone_stages_from_the_head(expected: dict[str, float]) -> None:
    model = Staged(*expected)
    settings = TrainConfig(learning_rate=1.0, layer_decay=0.5)
    found = {
        name: group["lr"]
        for group in parameter_groups(model, settings)
        for name in names_of(model, group)
    }
    assert found == expected


def test_layer_decay_and_multipliers_multiply() -> None:
    model = Staged("backbone.layer4.weight", "head.weight")
    settings = TrainConfig(learning_rate=1.0, layer_decay=0.5, lr_multipliers={"backbone": 0.1})
    assert [group["lr"] for group in parameter_groups(model, settings)] == [0.05, 1.0]


def test_layer_decay_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.layer_decay: .* tell no stages apart"):
        parameter_groups(Model(), TrainConfig(layer_decay=0.9))


def test_cosine_falls_from_the_warm_up_to_the_end() -> None:
    settings = TrainConfig(schedule="cosine", epochs=11, warmup_steps=100, warmup_factor=0.0)
    expected = {0: 0.0, 50: 0.5, 100: 1.0, 350: 0.8535533906, 600: 0.5, 850: 0.1464466094}
    for step, factor in expected.items():
        assert learning_rate_factor(step, 100, settings) == pytest.approx(factor, abs=1e-9)
    assert 0 < learning_rate_factor(1099, 100, settings) < 1e-5


def test_warm_up_as_a_share_of_the_run() -> None:
    settings = TrainConfig(schedule="cosine", epochs=4, warmup_share=0.25, warmup_factor=0.0)
    for step, factor in ((0, 0.0), (5, 0.5), (10, 1.0), (25, 0.5), (40, 0.0)):
        assert learning_rate_factor(step, 10, settings) == pytest.approx(factor, abs=1e-12), step
