"""Gates of reused filters, recorded for every query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detrelay.heads import HEADS
from detrelay.heads.stageinteractor.gates import watched_gates
from factories import small_head_config


def test_gates_are_recorded_for_every_query() -> None:
    torch.manual_seed(0)
    config = small_head_config("stageinteractor", num_stages=4)
    model = HEADS["stageinteractor"].model(config).eval()
    mixings = [stage.mixing for stage in model.head.stages]
    last = mixings[-1]
    width, reused = last.shape.width, last.shape.reused
    with torch.no_grad():  # factors 0.9 and 0.5 for the newest filter, 0.2 and 0.2 for others
        factors = torch.full((last.shape.groups, width, 2, reused), 0.2)
        factors[..., -1] = torch.tensor([0.9, 0.5])
        last.channel_gates.bias.copy_(factors.logit().flatten())
        last.pattern_gate.bias.fill_(torch.tensor(0.8).logit())
    pixels = torch.rand(2, 3, 64, 64)
    with watched_gates(model) as gates, torch.no_grad():
        model(pixels)
    stages = len(mixings)
    found = {(gate.stage, gate.source, gate.kind): gate.by_query(8) for gate in gates}
    expected = {
        (stage, stage - count + index, "channel")
        for stage, count in enumerate(mixing.shape.reused for mixing in mixings)
        for index in range(count)
    } | {(s, s - 1, "spatial") for s, m in enumerate(mixings) if m.shape.reuse_spatial}
    assert set(found) == expected
    for (stage, source, kind), values in found.items():
        assert values.shape == (2, 8)
        value = 0.25
        if stage == stages - 1:
            value = 0.4 if kind == "spatial" else 0.45 if source == stage - 1 else 0.04
        assert values == pytest.approx(np.full((2, 8), value), abs=1e-6)
    model(pixels)
    assert gates[0].by_query(8).shape == (2, 8)  # nobody watches any more


def test_a_model_without_reuse_has_no_gates() -> None:
    config = small_head_config("stageinteractor", max_reused_filters=0, reuse_spatial_filters=False)
    with watched_gates(HEADS["stageinteractor"].model(config)) as gates:
        assert gates == []
