"""A compiled detector is not compiled anew at each number of denoising queries."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from detrelay.core.structures import Targets
from detrelay.heads import HEADS
from factories import small_head_config


def compilations(objects: list[int], **options: bool) -> list[int]:
    """Graphs compiled so far, after a step with each number of objects."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = small_head_config(
        "dino", d_model=32, denoising_groups=None, denoising_queries=16, **options
    )
    model = HEADS["dino"].model(config).train()
    counter = CompileCounter()  # runs the graphs as they are
    model.compile(backend=counter, dynamic=True)
    pixels = torch.randn(1, 3, 128, 128)
    counts = []
    for number in objects:
        image = torch.zeros(number, dtype=torch.int64)
        boxes = 0.2 + 0.3 * torch.rand(number, 4)
        model(pixel_values=pixels, targets=Targets(image, boxes, image, 1))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


@pytest.mark.slow
def test_few_compilations_where_denoising_queries_are_padded() -> None:
    padded = compilations([3, 4, 5, 6, 7, 8], denoising_padding=True)
    assert padded[0] == padded[1]
    assert padded[2] == padded[5]
