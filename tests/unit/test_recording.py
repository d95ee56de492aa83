"""Predictions of all stages, recorded and analysed: planted facts, and every head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
)

from detrelay.apps.transformers_stages import ForeignDetector
from detrelay.assigners import CrossStageAssigner, HungarianAssigner
from detrelay.core.data.image_processing import DetrelayImageProcessor
from detrelay.core.evaluation.cascade import instability, moved_labels, refinement
from detrelay.core.evaluation.recording import Recording, record_stages
from detrelay.core.structures import StageGroup, StagePrediction
from detrelay.heads import HEADS
from factories import SMALL_HEADS, small_head_config

OBJECT = [0.25, 0.5, 0.2, 0.4]
NARROW = [0.25, 0.5, 0.12, 0.4]  # IoU 0.6 with it
AWAY = [0.8, 0.8, 0.1, 0.1]


class PlantedHead(nn.Module):
    """Two stages, three queries, two classes: the object passes from query 0 to query 1."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def forward(self, pixels: Tensor) -> tuple[StageGroup, ...]:
        for stage, layer in enumerate(self.classify):
            layer(torch.eye(3, 4)[None] * (stage + 1))
        logits = torch.tensor([[[-9.0, 4.0], [-9.0, -2.0], [3.0, -9.0]]])
        boxes = (torch.tensor([[OBJECT, NARROW, AWAY]]), torch.tensor([[NARROW, OBJECT, AWAY]]))
        later = logits[:, [1, 0, 2]]
        stages = (StagePrediction(logits, boxes[0]), StagePrediction(later, boxes[1]))
        return (StageGroup("decoder", stages),)


class PlantedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = PlantedHead()

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> None:
        self.head(pixel_values)


def batch_of(*image_ids: int, boxes: list[list[float]], size: int = 64) -> dict[str, Any]:
    return {
        "pixel_values": torch.rand(len(image_ids), 3, size, size),
        "pixel_mask": torch.ones(len(image_ids), size, size, dtype=torch.long),
        "labels": [
            {
                "class_labels": torch.zeros(len(boxes), dtype=torch.long),
                "boxes": torch.tensor(boxes).reshape(-1, 4),
                "image_id": torch.tensor([image_id]),
                "orig_size": torch.tensor([100, 200]),
            }
            for image_id in image_ids
        ],
    }


def record(model: Any, batches: list[dict[str, Any]], **changes: Any) -> Recording:
    own = HungarianAssigner()
    options = {"category_ids": [5, 7], "class_indices": [1], "max_detections": 100}
    return record_stages(
        model, batches, DetrelayImageProcessor(), own=own, learned=CrossStageAssigner(own),
        **(options | changes),
    )  # fmt: skip


def test_planted_facts_are_recorded_and_counted() -> None:
    batches = [batch_of(31, boxes=[OBJECT]), batch_of(4, boxes=[]), batch_of(8, boxes=[OBJECT])]
    found = record(PlantedModel(), batches)
    cascade = found.cascade
    assert found.image_ids.tolist() == [4, 8, 31]
    assert found.seen.tolist() == [1, 2, 0]
    assert cascade.image.tolist() == [1, 2]
    assert cascade.image_sizes.tolist() == [[200, 100]] * 3
    assert cascade.category.tolist() == [0, 0]  # of the data; the model's is 1
    np.testing.assert_allclose(cascade.target_boxes, [[30, 30, 40, 40]] * 2, atol=1e-4)
    np.testing.assert_allclose(cascade.boxes[0, 1, 0], [30, 30, 40, 40], atol=1e-4)
    np.testing.assert_allclose(cascade.boxes[0, 2, 2], [150, 75, 20, 10], atol=1e-4)
    assert cascade.query_of().tolist() == [[0, 0], [1, 1]]

    (change,) = instability(cascade)
    assert (change.objects, change.moved, change.labelled, change.changed) == (2, 2, 4, 4)
    moved = moved_labels(cascade, 1)
    assert (moved.own, moved.kept, moved.moved) == ([2, 2], [2, 2], [2, 2])
    assert moved.origin.tolist() == [[0, 2], [2, 0]]
    assert moved.by_iou[:, 5:7].sum(axis=1).tolist() == [2, 2]  # 0.6 in float32
    assert refinement(cascade).iou == pytest.approx([0.6, 1.0], abs=1e-5)
    assert found.similarity is not None
    assert found.similarity.matrix() == pytest.approx(np.ones((2, 2)))
    # query 1, which the last stage matches, is the second row of the identity, twice in stage 2
    assert found.features is not None
    assert found.features.values.tolist() == [[[0, 1, 0, 0]] * 2, [[0, 2, 0, 0]] * 2]
    assert found.features.image.tolist() == [1, 2]
    assert found.features.category.tolist() == [0, 0]

    first = found.detections[0]
    best = first.select(first.scores > 0.9)
    assert best.category_ids.tolist() == [7, 5] * 3
    assert best.image_ids.tolist() == [4, 4, 8, 8, 31, 31]
    np.testing.assert_allclose(best.boxes_xywh[0], [30, 30, 40, 40], atol=1e-4)


class SortingHead(PlantedHead):
    """The same, but the second stage has its queries in another order: rows 0, 1, 2 are 2, 0, 1."""

    def forward(self, pixels: Tensor) -> tuple[StageGroup, ...]:
        (group,) = super().forward(pixels)
        first, second = group.stages
        rows = [2, 0, 1]
        self.classify[0](torch.eye(3, 4)[None])
        self.classify[1](2 * torch.eye(3, 4)[rows][None])
        turned = StagePrediction(
            second.logits[:, rows], second.boxes[:, rows], slot=torch.tensor([rows])
        )
        return (StageGroup("decoder", (first, turned)),)


def test_queries_that_a_head_sorts_anew_are_followed_by_slot() -> None:
    model = PlantedModel()
    model.head = SortingHead()
    found, plain = (record(m, [batch_of(1, boxes=[OBJECT])]) for m in (model, PlantedModel()))
    np.testing.assert_array_equal(found.cascade.boxes, plain.cascade.boxes)
    assert found.cascade.query_of().tolist() == [[0], [1]]
    assert found.features is not None
    assert found.features.values[1].tolist() == [[0, 2, 0, 0]]


def test_images_come_by_id_whatever_the_order_of_the_batches() -> None:
    torch.manual_seed(0)
    model = HEADS["stageinteractor"].model(small_head_config("stageinteractor"))
    batches = [batch_of(image, boxes=[OBJECT, AWAY][:count]) for image, count in ((7, 2), (3, 1))]
    options = {"category_ids": [1, 2, 3, 4], "class_indices": [0, 1, 2, 3]}
    first, second = (record(model, order, **options) for order in (batches, batches[::-1]))
    for one, other in zip(first.detections, second.detections, strict=True):
        np.testing.assert_array_equal(one.image_ids, other.image_ids)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
    assert first.cascade.image.tolist() == second.cascade.image.tolist() == [0, 1, 1]
    np.testing.assert_allclose(first.cascade.target_boxes, second.cascade.target_boxes)
    np.testing.assert_allclose(first.cascade.boxes, second.cascade.boxes, atol=1e-4)
    np.testing.assert_array_equal(first.cascade.query_of(), second.cascade.query_of())
    assert first.features is not None
    assert second.features is not None
    np.testing.assert_allclose(first.features.values, second.features.values, atol=1e-5)


def test_nothing_to_look_at_is_refused() -> None:
    with pytest.raises(ValueError, match="no image"):
        record(PlantedModel(), [])


@pytest.mark.parametrize(
    "case", ["stageinteractor", "deformable_detr_two_stage", "dn_detr", "dino"]
)
def test_every_head_shows_its_stages(case: str) -> None:
    torch.manual_seed(0)
    model = HEADS[SMALL_HEADS[case][0]].model(small_head_config(case)).train()
    batch = batch_of(1, 2, boxes=[OBJECT, AWAY])
    found = record(model, [batch, batch], category_ids=[1, 2, 3, 4], class_indices=[0, 1, 2, 3])
    assert model.training
    stages = len(found.detections)
    assert stages >= 3
    assert found.cascade.boxes.shape[:2] == (stages, 4)
    assert found.similarity is not None
    matrix = found.similarity.matrix()
    assert matrix.shape == (stages, stages)
    assert matrix.diagonal() == pytest.approx(np.ones(stages))
    with torch.no_grad():
        output = model.eval()(batch["pixel_values"], batch["pixel_mask"])
    expected = DetrelayImageProcessor().post_process_object_detection(
        output, 0.0, torch.tensor([[100, 200]] * 2), 100
    )
    last = found.detections[-1].select(np.flatnonzero(found.detections[-1].image_ids == 1))
    half = len(last) // 2
    np.testing.assert_allclose(last.scores[:half], expected[0]["scores"].numpy(), atol=1e-6)


def tiny_transformers_model(kind: str) -> Any:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"] if kind == "deformable" else ["stage4"],
    )  # fmt: skip
    common: dict[str, Any] = {
        "backbone_config": backbone, "d_model": 32, "encoder_layers": 1, "decoder_layers": 3,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 6, "num_labels": 4,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "auxiliary_loss": True,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "deformable":
        return DeformableDetrForObjectDetection(DeformableDetrConfig(**common)).eval()
    return DetrForObjectDetection(DetrConfig(**common)).eval()


@pytest.mark.parametrize("kind", ["deformable", "softmax"])
def test_models_of_transformers_show_their_stages(kind: str) -> None:
    model = tiny_transformers_model(kind)
    batch = batch_of(1, boxes=[OBJECT], size=128)
    with torch.no_grad():
        output = model(batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    scores = output.logits.sigmoid() if kind == "deformable" else output.logits.softmax(-1)[..., :4]
    found = record(ForeignDetector(model), [batch], category_ids=[1, 2, -1, 4], class_indices=[0])
    assert len(found.detections) == 3
    last = found.detections[-1]
    expected = scores.flatten().sort(descending=True).values
    np.testing.assert_allclose(last.scores, expected.numpy(), atol=1e-5)
    assert set(last.category_ids.tolist()) == {1, 2, -1, 4}
    centre = output.pred_boxes[0, :, :2] - output.pred_boxes[0, :, 2:] / 2
    np.testing.assert_allclose(
        found.cascade.boxes[-1, 0, :, :2], (centre * torch.tensor([200, 100])).numpy(), atol=1e-3
    )
    assert found.similarity is not None
    matrix = found.similarity.matrix()
    assert matrix.diagonal() == pytest.approx(np.ones(3))
    assert found.features is not None
    weight = model.class_embed[-1] if kind == "deformable" else model.class_labels_classifier
    query = found.cascade.own[-1].query
    by_hand = weight(torch.from_numpy(found.features.values[-1]))
    torch.testing.assert_close(by_hand, output.logits[0, query], rtol=1e-4, atol=1e-5)


def test_features_that_are_not_found_are_left_out() -> None:
    model = tiny_transformers_model("softmax")
    model.class_labels_classifier = nn.Sequential(model.class_labels_classifier, nn.Softsign())
    found = record(
        ForeignDetector(model), [batch_of(1, boxes=[OBJECT], size=128)], category_ids=[1, 2, -1, 4],
        class_indices=[0],
    )  # fmt: skip
    assert len(found.detections) == 3
    assert found.similarity is None
    assert found.features is None
