"""Every assigner with every class loss, on predictions made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from detrelay.assigners import ASSIGNERS
from detrelay.core.class_losses import CLASS_LOSSES
from detrelay.core.criterion import Criterion
from detrelay.core.losses import LossConfig
from detrelay.core.structures import StageGroup
from factories import make_stages, make_targets


@pytest.mark.parametrize("loss", list(CLASS_LOSSES))
@pytest.mark.parametrize("assigner", list(ASSIGNERS))
@pytest.mark.parametrize("counts", [(25, 0, 15), (0, 0, 0)], ids=["40 objects", "none"])
def test_losses_and_gradients_are_finite(assigner: str, loss: str, counts: tuple[int, ...]) -> None:
    stages = [
        replace(s, logits=40 * s.logits.requires_grad_(), boxes=s.boxes.requires_grad_())
        for s in make_stages(stages=3, batch=3, queries=60, classes=8)
    ]
    leaves = [leaf for s in stages for leaf in (s.logits, s.boxes)]
    targets = make_targets(counts, classes=8)
    criterion = Criterion(LossConfig(class_loss=loss).terms(), {"decoder": ASSIGNERS[assigner]()})
    output = criterion([StageGroup("decoder", tuple(stages))], targets)
    assert torch.isfinite(output.total)
    gradients = torch.autograd.grad(output.total, leaves)
    for index, gradient in enumerate(gradients):
        assert torch.isfinite(gradient).all()
        is_logits = index % 2 == 0
        assert bool(gradient.abs().sum() > 0) == (is_logits or sum(counts) > 0)
    for key, value in output.losses.items():
        assert value >= 0, key
