"""A running average of the weights, evaluated and published in place of the weights themselves."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detrelay.core.detector.model import DetectorForObjectDetection


def average_of(model: DetectorForObjectDetection, decay: float) -> AveragedModel:
    """A copy of the model that follows it: average = decay x average + (1 - decay) x model.

    Buffers are averaged like parameters, as in DINO's released code. `update_parameters(model)` is
    to be called after each step; `.module` is the averaged model.

    Args:
        model: in its state before the first step and before any wrapping.
        decay: in [0, 1); DINO's code uses 0.9997.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    # The first update would copy. The average starts from the weights before the first step, so
    # that is done now, and a resumed run need not know how many updates there were.
    average.update_parameters(model)
    average.requires_grad_(False)
    assert isinstance(average.n_averaged, torch.Tensor)
    return average.eval()
