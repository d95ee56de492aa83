"""Divisors and target scores by hand."""

from __future__ import annotations

import pytest
import torch

from detrelay.core.loss_terms import Divisor, Normalizers, score_targets
from detrelay.core.structures import Targets
from factories import fixed, make_stages


def test_divisors_by_hand() -> None:
    numbers = [torch.tensor(value) for value in (7.0, 5.0, 3.0, 0.25)]
    normalizers = Normalizers(*numbers, num_processes=2)
    expected = {"targets": 1.5, "pairs": 2.5, "larger": 3.5, "targets*6": 9.0, "pairs*0.1": 0.5}
    for text, value in expected.items():
        assert normalizers.of(Divisor.parse(text)).item() == value, text
    assert normalizers.of(Divisor("own")).item() == 0.125
    assert (normalizers.classes.item(), normalizers.boxes.item()) == (3.5, 2.5)


@pytest.mark.parametrize("text", ["own", "target", "pairs*", "pairs*0", "pairs*-1", "targets*inf"])
def test_bad_divisors_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a divisor must be targets, pairs, larger"):
        Divisor.parse(text)


def test_of_several_scores_for_one_class_the_highest_holds() -> None:
    prediction = make_stages(stages=1, batch=1, queries=2, classes=3)[0]
    targets = Targets(torch.tensor([1, 1]), torch.rand(2, 4), torch.tensor([0, 0]), 1)
    pairs = fixed((0, 1, 0), (0, 1, 1), (0, 0, 0))
    wanted, positive = score_targets(prediction, targets, pairs, torch.tensor([0.7, 0.2, 0.0]))
    assert wanted[0].tolist() == [[0, 0, 0], [0, pytest.approx(0.7), 0]]
    assert positive[0].tolist() == [[False, True, False], [False, True, False]]
