"""What fine-tuning takes from a saved model, and which models it rejects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detrelay.apps.train import Arguments, resolve
from detrelay.core.data.image_processing import DetrelayImageProcessor
from hub_model import save_small_head
from tiny_run import shrink_backbone


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_backbone(monkeypatch)


def test_settings_sizes_and_padding_are_those_of_the_model(tmp_path: Path) -> None:
    folder = save_small_head("dn_detr", tmp_path / "saved", torch.float32, denoising_groups=None)
    recipe = resolve(Arguments(init=folder, set=(("model.num_queries=5",),)))
    assert recipe.head == "dn_detr"
    assert recipe.model["num_queries"] == 5
    assert recipe.model["d_model"] == 64
    assert recipe.model["denoising_groups"] is None  # which is not the default
    assert "category_ids" not in recipe.model
    sides = (recipe.data.short_sides, recipe.data.max_size, recipe.data.pad_size_divisor)
    assert sides == ((64,), 96, 16)
    assert (recipe.train.schedule, recipe.train.warmup_share) == ("cosine", 0.05)
    named = resolve(Arguments("dn_detr_r50_12e", init=folder))
    assert named.model["d_model"] == 64
    assert (named.data.eval_short_side, named.train.epochs) == (800, 12)


def test_a_recipe_adds_what_exists_in_training_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_small_head("dn_detr", tmp_path / "saved", torch.float32)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'head = "dn_detr"\n[model]\nclassify_regions = true\nhybrid_queries = 6\nnum_queries = 50\n'
    )
    model = resolve(Arguments(str(recipe), init=folder)).model
    assert (model["classify_regions"], model["hybrid_queries"]) == (True, 6)
    assert model["num_queries"] == 8
    line = capsys.readouterr().out
    assert line == f"--init {folder} decides, not the recipe: num_queries = 8 (recipe: 50)\n"


def refusals(folder: Path) -> Iterator[tuple[Arguments, str]]:
    yield Arguments("dino_r50_4scale_12e", init=folder), "is a dn_detr, but --recipe dino"
    yield Arguments(init=folder, head="dino"), "its head is dn_detr; omit --head dino"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "detr"}))
    yield Arguments(init=folder), "holds a 'detr'; expected one of the heads deformable_detr"
    (folder / "config.json").write_text("[]")
    yield Arguments(init=folder), "is not the config of a model"


def test_what_cannot_be_fine_tuned_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_small_head("dn_detr", tmp_path / "saved", torch.float32)
    other = DetrelayImageProcessor(image_mean=[0.5, 0.5, 0.5])
    other.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"image_mean \(0.5, 0.5, 0.5\); training a resnet18 supports"
    ):
        resolve(Arguments(init=folder))
    DetrelayImageProcessor().save_pretrained(folder)
    for arguments, message in refusals(folder):
        with pytest.raises(ValueError, match=re.escape(message)) as refused:
            resolve(arguments)
        assert len(str(refused.value).splitlines()) == 1
