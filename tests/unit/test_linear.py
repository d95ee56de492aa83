"""Linear layers by either kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from detrelay.core.ops.linear import linear


@pytest.mark.parametrize("outputs", [5, 256])
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 16), (0, 16)])
def test_linear_without_gradient_equals_torch(shape: tuple[int, ...], outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator)
    weight = torch.randn(outputs, 16, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        strided = torch.randn(outputs, 32, generator=generator).chunk(2, dim=1)[1]
        torch.testing.assert_close(linear(x, strided), F.linear(x, strided))


def test_linear_keeps_gradients_and_double() -> None:
    weight = torch.randn(128, 8, requires_grad=True)
    linear(torch.randn(3, 8), weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert linear(torch.randn(3, 8).double(), weight.double()).dtype == torch.float64
