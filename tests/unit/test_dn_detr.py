"""DN-DETR's head: anchors, and the channel that tells denoising queries from the others."""

from __future__ import annotations

import torch

from detrelay.core.structures import StagePrediction
from detrelay.heads.deformable.dn_detr import DnDetrConfig, DnDetrHead, _silence
from factories import make_pyramid, make_targets, small_head_config


def fresh() -> DnDetrHead:
    torch.manual_seed(0)
    config = small_head_config("dn_detr")
    assert isinstance(config, DnDetrConfig)
    return DnDetrHead(config)


def test_boxes_start_at_the_anchors() -> None:
    head = fresh().eval()
    (group,) = head(make_pyramid())
    for stage in group.stages:
        for boxes in stage.boxes:
            torch.testing.assert_close(boxes, head.anchors.weight.sigmoid(), atol=1e-5, rtol=1e-5)


def test_the_last_channel_is_one_for_denoising_queries_only() -> None:
    head = fresh().train()
    entered: list[torch.Tensor] = []
    head.layers[0].register_forward_pre_hook(lambda _module, inputs: entered.append(inputs[0]))
    own, denoising = head(make_pyramid(), make_targets((2, 1)))
    (queries,) = entered
    count = denoising.stages[0].logits.shape[1]
    assert denoising.known_pairs is not None
    pairs = denoising.known_pairs
    assert (queries[pairs.image, pairs.query, -1] == 1).all()
    assert (queries[:, count:, -1] == 0).all()
    assert own.stages[0].logits.shape[1] == queries.shape[1] - count


def test_unused_denoising_queries_predict_background() -> None:
    stage = StagePrediction(torch.ones(1, 2, 3), torch.rand(1, 2, 4))
    silenced = _silence(stage, torch.tensor([[True, False]]))
    assert silenced.logits.tolist() == [[[1.0] * 3, [-1e4] * 3]]
    assert silenced.boxes is stage.boxes
