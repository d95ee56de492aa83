"""Input that is checked before any model sees it."""

from __future__ import annotations

import pytest
import torch

from detrelay.core.detector.checks import check_input, check_targets
from factories import make_targets


def test_pixels_and_masks_that_fit_pass() -> None:
    check_input(torch.zeros(2, 3, 4, 6), None)
    mask = torch.zeros(2, 4, 6)
    mask[:, 0, 0] = 1
    check_input(torch.zeros(2, 3, 4, 6, dtype=torch.float16), mask)
    check_targets(make_targets((2, 0)), batch_size=2, num_classes=4)


def test_mismatches_are_reported_with_their_shape() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\] .* found \[2, 1, 4, 6\]"):
        check_input(torch.zeros(2, 1, 4, 6), None)
    with pytest.raises(TypeError, match=r"floating point and normalised, found torch\.uint8"):
        check_input(torch.zeros(2, 3, 4, 6, dtype=torch.uint8), None)
    with pytest.raises(ValueError, match=r"= \[2, 4, 6\] as pixel_values are, found \[2, 6, 4\]"):
        check_input(torch.zeros(2, 3, 4, 6), torch.ones(2, 6, 4))
    mask = torch.ones(2, 4, 6)
    mask[1, 0, 0] = 0
    with pytest.raises(ValueError, match=r"of images \[1\] of the batch is 0 there"):
        check_input(torch.zeros(2, 3, 4, 6), mask)
    with pytest.raises(ValueError, match="targets are of 2 images, pixel_values of 3"):
        check_targets(make_targets((1, 1)), batch_size=3, num_classes=4)
    targets = make_targets((1, 1))
    targets.labels[1] = 7
    with pytest.raises(ValueError, match="class label 7 found in image 1"):
        check_targets(targets, batch_size=2, num_classes=4)
