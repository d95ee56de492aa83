"""The plan of a run: what it says, and that nothing is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import detrelay.apps.dry_run as plans
from detrelay.apps.build import build_criterion, build_model
from detrelay.apps.train import Arguments, train
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.errors import DataError
from detrelay.core.recipes.recipe import Recipe, load_recipe, override
from tiny_run import TINY, shrink_backbone, tiny_run

RECIPES = Path(__file__).parents[2] / "apps" / "src" / "detrelay" / "apps" / "recipes"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_backbone(monkeypatch)


def tiny_recipe(*settings: str) -> Recipe:
    return load_recipe(RECIPES / "shapes.toml", [*TINY, *settings])


def tiny_model(recipe: Recipe) -> DetectorForObjectDetection:
    categories = ShapesDataset(1, image_size=64).categories
    return build_model(recipe, categories, None, fresh=False).train()


def test_the_plan_is_printed_and_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    settings = ["train.published_batch_size=16", "train.lr_multipliers.backbone=0.1"]
    assert tiny_run(output, *settings, dry_run=True) == 0
    assert not output.exists()
    out = capsys.readouterr().out
    assert "num_queries = 8" in out  # the resolved recipe
    assert "train: 14 images" in out
    assert "step: 4 images (1 process(es) x 4 images x 1 pass(es)), learning rate 0.001" in out
    assert "published: 16 images" in out
    assert "steps: 3 per epoch x 2 epochs = 6; 24 images seen" in out
    (slow,) = [line for line in out.splitlines() if line.endswith("backbone.conv1.weight")]
    assert slow.split()[2:4] == ["0.0001", "0.0001"]
    assert "GiB at least" in out


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", r"no annotation file or folder .*nowhere"), (".", r"no annotations in a known")],
)
def test_data_that_are_named_and_missing_end_it_at_once(
    place: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=message):
        tiny_run(tmp_path / "run", dry_run=True, data=(tmp_path / place,))
    assert capsys.readouterr().out == ""


def test_without_the_data_of_a_published_recipe_the_rest_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "published.toml"
    paths = {key: str(tmp_path / f"{key}.json") for key in ("train_annotations", "val_annotations")}
    data = replace(tiny_recipe().data, **paths)
    recipe.write_text(replace(tiny_recipe(), data=data).to_toml())
    with pytest.raises(DataError, match=r"no annotation file .*train_annotations\.json"):
        train(Arguments(recipe=str(recipe), dry_run=True))
    out = capsys.readouterr().out
    assert out.startswith("no data: no annotation file ")
    assert "steps: 2 epochs of unknown length" in out
    assert "activations" in out


def test_drops_are_given_in_steps() -> None:
    recipe = tiny_recipe("train.epochs=12", "train.milestones=[8,11,12]", "train.gamma=0.1")
    *_, rate = plans.schedule_lines(recipe, 2, 800)  # 4 x 2 images per step: 100 steps per epoch
    assert rate == "learning rate: warm-up of 2 steps, then x 0.1 at steps 800, 1100"
    _, steps, _ = plans.schedule_lines(tiny_recipe("train.accumulation_steps=3"), 2, 800)
    assert steps == "steps: 33 per epoch x 2 epochs = 66; 1584 images seen"  # of 24 images each
    recipe = tiny_recipe("train.schedule=cosine")
    assert plans.schedule_lines(recipe, 1, 14)[-1].endswith("then half a cosine to 0")


def test_groups_are_counted() -> None:
    recipe = tiny_recipe("train.lr_multipliers.backbone=0.1", "model.backbone_frozen_stages=1")
    model = tiny_model(recipe)
    _, _, slow, fast, frozen, _ = plans.group_lines(model, recipe, 1)
    # conv1 and bn1, layer1 with its norm
    assert frozen.split() == ["6", f"{8 * 3 * 9 + 16 + 8 * 8 * 9 + 16:,}", "frozen"]
    assert slow.split()[0] == str(2 * 3)  # two more stages: convolution, scale, shift
    scaled = [
        *("train.lr_multipliers.backbone=0.1", "train.published_batch_size=2"),
        "train.scale_learning_rate=linear",
    ]
    _, _, slow_again, *_ = plans.group_lines(model, tiny_recipe(*scaled), 3)  # 12 images per step
    assert float(slow_again.split()[2]) == pytest.approx(6 * float(slow.split()[2]))
    counts = [int(line.split()[1].replace(",", "")) for line in (slow, fast, frozen)]
    assert sum(counts) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["data.short_sides=[480,800]", "data.max_size=1333", "train.batch_size=1"], (800, 1344)),
        (["data.short_sides=[480,800]", "data.max_size=1333", "train.batch_size=2"], (1344, 1344)),
        (["data.short_sides=[800]", "data.max_size=1333", "data.aspect_group=4"], (800, 1344)),
        (["data.jitter_size=1000"], (1024, 1024)),
    ],
)
def test_the_largest_batch(settings: list[str], expected: tuple[int, int]) -> None:
    assert plans.largest_batch(tiny_recipe(*settings)) == expected


def test_memory_of_weights_is_exact_and_that_of_activations_follows_the_rule() -> None:
    sizes = ["data.short_sides=[512]", "data.max_size=640", "data.aspect_group=3"]
    recipe = tiny_recipe(*sizes, "train.batch_size=3", "train.ema_decay=0.9")
    recipe = override(recipe, ["model.backbone_frozen_stages=1"])
    model, criterion = tiny_model(recipe), build_criterion(recipe)
    memory = plans.estimate_memory(model, criterion, recipe, Accelerator(cpu=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert memory.model == 4 * sum(p.numel() for p in model.parameters()) + buffers
    assert memory.average == memory.model
    one = plans.kept_for_backward(model, criterion, (512, 640), None, torch.device("cpu"))
    assert memory.activations == pytest.approx(3 * one, rel=0.01)
    # the first norm alone keeps a map of 8 channels at a quarter of the pixels
    assert one > 4 * 8 * 512 * 640 / 4
    half = plans.kept_for_backward(
        model, criterion, (512, 640), torch.bfloat16, torch.device("cpu")
    )
    assert half < 0.9 * one
    less = plans.estimate_memory(
        model,
        criterion,
        override(recipe, ["train.activation_checkpointing=true"]),
        Accelerator(cpu=True),
    )
    assert less.activations < 0.9 * memory.activations
