"""Deformable DETR against transformers' own, with copied weights, in float64."""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeformableDetrConfig as TheirConfig
from transformers import DeformableDetrForObjectDetection as TheirModel
from transformers import ResNetConfig
from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)

from deformable_reference import criterion
from detrelay.core.detector.pyramid import build_pyramid
from detrelay.core.structures import Targets
from detrelay.heads import DeformableDetrConfig, DeformableDetrForObjectDetection
from detrelay.heads.convert.conversion import translate
from detrelay.heads.convert.transformers_folder import to_official_names

CANVAS, SIZES = (150, 190), ((150, 120), (101, 190))
CHANNELS = (64, 128, 256, 512)  # of resnet18
LAYERS, QUERIES, DIM, CLASSES = 3, 11, 64, 5
LOSS = DeformableDetrForObjectDetection.loss_config
VARIANTS: dict[str, dict[str, bool]] = {
    "base": {},
    "refine": {"box_refinement": True},
    "two_stage": {"box_refinement": True, "two_stage": True},
}


class Maps(nn.Module):
    """Stands for their backbone: given maps, and the mask resized to each."""

    def __init__(self, maps: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        mask = pixel_mask[None].double()
        return [(m, F.interpolate(mask, size=m.shape[-2:]).bool()[0]) for m in self.maps[1:]]


def proposal_code(_model: Any, proposals: Tensor) -> Tensor:
    """Their code of proposals, in float64 instead of float32."""
    width = DIM // 2
    frequency = 10000 ** (2 * (torch.arange(width) // 2).double() / width)
    angle = proposals.sigmoid()[..., None] * 2 * math.pi / frequency
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(2)


def their_model(variant: str, maps: tuple[Tensor, ...]) -> TheirModel:
    flags = VARIANTS[variant]
    config = TheirConfig(
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=list(CHANNELS),
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=DIM,
        encoder_layers=2,
        decoder_layers=LAYERS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=QUERIES,
        two_stage_num_proposals=QUERIES,
        num_labels=CLASSES,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        auxiliary_loss=True,
        class_cost=2,
        with_box_refine=flags.get("box_refinement", False),
        two_stage=flags.get("two_stage", False),
        attn_implementation="eager",
    )
    model = TheirModel(config)
    model.model.backbone = Maps(maps)
    untie(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        scale = 0.8 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.2
        noise = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + ("norm" in name and name.endswith("weight"))
    model.double().train()
    model.model.get_proposal_pos_embed = MethodType(proposal_code, model.model)
    return model


def untie(model: TheirModel, config: TheirConfig) -> None:
    """Prediction heads as in the released code: one for all layers, or one per layer."""
    count = LAYERS + config.two_stage if config.with_box_refine else 1
    for name in ("class_embed", "bbox_embed"):
        own = [copy.deepcopy(head) for head in getattr(model, name)[:count]]
        heads = nn.ModuleList(own if config.with_box_refine else own * LAYERS)
        setattr(model, name, heads)
        if getattr(model.model.decoder, name, None) is not None:
            setattr(model.model.decoder, name, heads)


def as_ours(theirs: dict[str, Tensor], config: DeformableDetrConfig) -> dict[str, Tensor]:
    """Their tensors under our names; queries, keys and values packed."""
    translation = translate(to_official_names(theirs)[0], config)
    assert not translation.unknown
    return translation.state


def named(model: TheirModel) -> dict[str, nn.Parameter]:
    """All parameters, shared ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def make_maps(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(
            2,
            channels,
            -(-CANVAS[0] // stride),
            -(-CANVAS[1] // stride),
            generator=generator,
            dtype=torch.float64,
        )
        for channels, stride in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    )


def make_labels() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "class_labels": torch.randint(CLASSES, (count,), generator=generator),
            "boxes": 0.2 + 0.5 * torch.rand(count, 4, generator=generator, dtype=torch.float64),
        }
        for count in (3, 4)
    ]


def their_losses(output: Any, model: TheirModel, labels: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Their terms under our keys, including the encoder's, which they omit."""
    result = {}
    terms = {"loss_ce": "class", "loss_bbox": "l1", "loss_giou": "giou"}
    for key, value in output.loss_dict.items():
        name, _, stage = key.rpartition("_") if key[-1].isdigit() else (key, "", str(LAYERS - 1))
        if name in terms:
            result[f"decoder/{stage}/{terms[name]}"] = value
    if model.config.two_stage:
        matcher = DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0)
        loss = DeformableDetrImageLoss(matcher, CLASSES, 0.25, ["labels", "boxes"])
        proposals = {
            "logits": output.enc_outputs_class,
            "pred_boxes": output.enc_outputs_coord_logits.sigmoid(),
        }
        binary = [{**item, "class_labels": torch.zeros_like(item["class_labels"])}
                  for item in labels]  # fmt: skip
        for key, value in loss(proposals, binary).items():
            result[f"proposals/0/{terms[key]}"] = value
    return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_equals_transformers(variant: str) -> None:
    maps, labels = make_maps(7), make_labels()
    mask = torch.zeros(2, *CANVAS, dtype=torch.int64)
    for index, (height, width) in enumerate(SIZES):
        mask[index, :height, :width] = 1
    theirs = their_model(variant, maps)
    expected = theirs(torch.zeros(2, 3, *CANVAS, dtype=torch.float64), mask, labels=labels)
    losses = their_losses(expected, theirs, labels)
    weights = {"class": 2, "l1": 5, "giou": 2}
    total = sum(weights[key.rpartition("/")[2]] * value for key, value in losses.items())
    total.backward()

    config = DeformableDetrConfig(
        backbone_name="resnet18",
        d_model=DIM,
        encoder_layers=2,
        decoder_layers=LAYERS,
        ffn_dim=48,
        num_queries=QUERIES,
        num_labels=CLASSES,
        dropout=0,
        **VARIANTS[variant],
    )
    ours = DeformableDetrForObjectDetection(config).double().train()
    state = as_ours(named(theirs), config)
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("backbone.") for name in missing)
    groups = ours.head(build_pyramid(ours.neck(maps), ours.level_strides, mask))
    output = criterion(LOSS)(groups, Targets.from_labels(labels))
    output.total.backward()

    auxiliary = [*expected.auxiliary_outputs, {"logits": expected.logits,
                                               "pred_boxes": expected.pred_boxes}]  # fmt: skip
    exact = {"atol": 1e-9, "rtol": 0}
    for stage, wanted in zip(groups[0].stages, auxiliary, strict=True):
        torch.testing.assert_close(stage.logits, wanted["logits"], **exact)
        torch.testing.assert_close(stage.boxes, wanted["pred_boxes"], **exact)
    assert output.losses.keys() == losses.keys()
    for key, value in output.losses.items():
        torch.testing.assert_close(value, losses[key], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(output.total, total, atol=1e-9, rtol=1e-9)
    gradients = as_ours({name: p.grad for name, p in named(theirs).items()}, config)
    for name, parameter in ours.named_parameters():
        if not name.startswith("backbone."):
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-9)
