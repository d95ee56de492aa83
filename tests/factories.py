"""Small predictions, targets and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detrelay.assigners import build_assigners
from detrelay.core.criterion import Criterion
from detrelay.core.detector.config import DetectorConfig
from detrelay.core.detector.model import DetectorForObjectDetection
from detrelay.core.structures import Assignment, FeaturePyramid, Pairs, StagePrediction, Targets
from detrelay.heads import HEADS, StageInteractorConfig
from detrelay.heads.deformable.denoising import DenoisingQueries
from detrelay.heads.deformable.passes import DecoderState, QuerySet, attention_mask
from detrelay.heads.query_sets import DECODER

STRIDES = (4, 8, 16, 32)


def make_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    """Random cxcywh boxes inside the image, [*shape, 4]."""
    size = 0.1 + 0.4 * torch.rand(*shape, 2, generator=generator)
    center = 0.5 * size + (1 - size) * torch.rand(*shape, 2, generator=generator)
    return torch.cat([center, size], dim=-1)


def make_stages(
    stages: int = 3,
    batch: int = 2,
    queries: int = 8,
    classes: int = 4,
    seed: int = 0,
) -> list[StagePrediction]:
    generator = torch.Generator().manual_seed(seed)
    return [
        StagePrediction(
            logits=torch.randn(batch, queries, classes, generator=generator),
            boxes=make_boxes(batch, queries, generator=generator),
        )
        for _ in range(stages)
    ]


def make_targets(counts: tuple[int, ...] = (3, 2), classes: int = 4, seed: int = 1) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return Targets.from_labels(
        [
            {
                "class_labels": torch.randint(classes, (count,), generator=generator),
                "boxes": make_boxes(count, generator=generator),
            }
            for count in counts
        ]
    )


def one_query() -> tuple[StagePrediction, Targets]:
    """One image, two queries at probability 1/2, one object."""
    prediction = StagePrediction(
        logits=torch.zeros(1, 2, 3, requires_grad=True),
        boxes=torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]], requires_grad=True),
    )
    targets = Targets(
        torch.tensor([2]), torch.tensor([[0.5, 0.5, 0.5, 0.25]]), torch.tensor([0]), 1
    )
    return prediction, targets


def fixed(*pairs: tuple[int, int, int], weight: Sequence[float] | None = None) -> Pairs:
    """Pairs of image, query and target."""
    columns = (torch.tensor(column) for column in zip(*pairs, strict=True))
    return Pairs(*columns, None if weight is None else torch.tensor(weight))


class Fixed:
    """An assigner that always returns the same; remembers its inputs."""

    def __init__(self, classes: Pairs, boxes: Pairs) -> None:
        self.assignment = Assignment(classes, boxes)
        self.seen: list[StagePrediction] = []

    def __call__(self, stages: Sequence[StagePrediction], targets: Targets) -> list[Assignment]:
        self.seen = list(stages)
        return [self.assignment] * len(stages)


def as_set(pairs: Pairs) -> set[tuple[int, int]]:
    """Query and target of every pair."""
    return set(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True))


def make_pyramid(
    batch: int = 2, dim: int = 32, height: int = 64, width: int = 96, seed: int = 2
) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    return FeaturePyramid(
        levels=tuple(torch.randn(batch, dim, *shape, generator=generator) for shape in shapes),
        strides=STRIDES,
        valid=tuple(torch.ones(batch, *shape, dtype=torch.bool) for shape in shapes),
        image_sizes=torch.tensor([[height, width]] * batch),
    )


_STAGEINTERACTOR: dict[str, Any] = {
    "num_queries": 8,
    "d_model": 32,
    "num_groups": 2,
    "num_attention_heads": 4,
    "num_stages": 4,
    "pattern_size": 2,
    "num_base_points": 2,
    "num_base_points_first": 3,
    "num_out_points": 8,
    "ffn_dim": 48,
}
_DEFORMABLE: dict[str, Any] = {
    "num_queries": 8,
    "d_model": 32,
    "num_attention_heads": 4,
    "num_points": 2,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "ffn_dim": 48,
    "dropout": 0,
}
# every head, as small as it goes, and the variants of a head that run other code
SMALL_HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "stageinteractor": ("stageinteractor", _STAGEINTERACTOR),
    "deformable_detr": ("deformable_detr", _DEFORMABLE),
    "deformable_detr_one_level": (
        "deformable_detr",
        {**_DEFORMABLE, "num_levels": 1, "num_backbone_levels": 1},
    ),
    "deformable_detr_refine": ("deformable_detr", {**_DEFORMABLE, "box_refinement": True}),
    "deformable_detr_two_stage": (
        "deformable_detr",
        {**_DEFORMABLE, "box_refinement": True, "two_stage": True},
    ),
    "dn_detr": ("dn_detr", {**_DEFORMABLE, "denoising_groups": 2}),
    "dino": ("dino", {**_DEFORMABLE, "denoising_queries": 12}),
    "dino_five_levels": (
        "dino",
        {**_DEFORMABLE, "num_levels": 5, "num_backbone_levels": 4, "denoising_queries": 12},
    ),
    "dino_without_denoising": ("dino", {**_DEFORMABLE, "denoising_groups": 0}),
}


def small_head_config(case: str, **changes: Any) -> DetectorConfig:
    """A config of `SMALL_HEADS` on a small backbone, with 4 classes unless `changes` name them."""
    head, values = SMALL_HEADS[case]
    backbone = {"backbone_name": "resnet18", "backbone_norm": "train", "backbone_frozen_stages": 0}
    classes = {} if "id2label" in changes else {"num_labels": 4}
    return HEADS[head].config(**{**backbone, **classes, **values, **changes})


def small_config(**changes: Any) -> StageInteractorConfig:
    """A StageInteractor that runs in milliseconds."""
    config = small_head_config("stageinteractor", **changes)
    assert isinstance(config, StageInteractorConfig)
    return config


def mask_beside(denoising: DenoisingQueries, num_queries: int) -> Tensor:
    """The attention mask of denoising queries placed before a decoder's own."""
    batch = denoising.content.shape[0]
    own = DecoderState(torch.zeros(batch, num_queries, 1), torch.zeros(batch, num_queries, 4))
    mask = attention_mask([denoising.query_set(), QuerySet(DECODER, own)])
    assert mask is not None
    return mask


def make_head(case: str, **changes: Any) -> tuple[DetectorForObjectDetection, Criterion]:
    """A fresh model in training mode, and the criterion that it was published with."""
    torch.manual_seed(0)
    entry = HEADS[SMALL_HEADS[case][0]]
    model = entry.model(small_head_config(case, **changes)).train()
    losses = entry.model.loss_config
    return model, Criterion(losses.terms(), build_assigners(entry.assigner, losses))
