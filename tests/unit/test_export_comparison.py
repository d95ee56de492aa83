"""Differences between a file and its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from detrelay.core.export.comparison import compare, measure, shapes_of


class Model(torch.nn.Module):
    """Scores are the sum of the real pixels."""

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> SimpleNamespace:
        scores = (pixel_values * pixel_mask[:, None]).sum((1, 2, 3)).view(-1, 1, 1)
        return SimpleNamespace(logits=scores, pred_boxes=scores.expand(-1, 1, 4))


def by_model(pixels: Any, mask: Any) -> tuple[Any, Any]:
    output = Model()(torch.from_numpy(pixels), torch.from_numpy(mask))
    return output.logits.numpy(), output.pred_boxes.numpy().copy()


def test_the_largest_difference_is_found_at_its_shape_and_batch() -> None:
    def run(pixels: Any, mask: Any) -> Any:
        logits, boxes = by_model(pixels, mask)
        if pixels.shape[2:] == (8, 16):
            boxes[-1, 0, 2] += 0.5 * (len(pixels) == 2)
        return logits, boxes

    found = compare(Model(), run, [(8, 8), (8, 16)])  # type: ignore[arg-type]
    assert [(each.batch, each.height, each.width) for each in found] == [
        *((batch, 8, 8) for batch in (1, 2, 3)),
        *((batch, 8, 16) for batch in (1, 2, 3)),
    ]
    assert [each.boxes for each in found] == pytest.approx([0, 0, 0, 0, 0.5, 0], abs=1e-5)
    assert max(each.logits for each in found) == 0


def test_other_shapes_and_numbers_that_are_none_are_infinitely_far() -> None:
    def run(pixels: Any, mask: Any) -> Any:
        logits, boxes = by_model(pixels, mask)
        return logits * np.nan, boxes[:, :, :2]

    found = compare(Model(), run, [(8, 8)])  # type: ignore[arg-type]
    assert {(each.logits, each.boxes) for each in found} == {(float("inf"), float("inf"))}


def test_both_are_timed_as_often() -> None:
    calls = []

    def run(pixels: Any, mask: Any) -> Any:
        calls.append(pixels.shape)
        return by_model(pixels, mask)

    threads = torch.get_num_threads()
    times = measure(Model(), run, (8, 16), rounds=3)  # type: ignore[arg-type]
    assert calls == [(1, 3, 8, 16)] * 4  # the first is not counted
    assert (times.height, times.width, times.rounds) == (8, 16, 3)
    assert min(times.model_seconds, times.file_seconds) > 0
    assert torch.get_num_threads() == threads


def test_shapes_go_up_to_the_size_of_use() -> None:
    assert shapes_of(800)[0] == shapes_of(None)[0] == (640, 640)
    assert shapes_of(32)[0] == (64, 64)
    assert len({*shapes_of(320)}) == 5
