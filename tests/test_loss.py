"""The blocked loss against torch's cross entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engram.builders.data import NOT_A_TARGET
from engram.builders.loss import sum_nll


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (2, 128)])
def test_loss_and_gradient_are_cross_entropys(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(*shape, 300) * 4).to(dtype).requires_grad_()
    targets = torch.randint(0, 300, shape)
    if shape[1] > 1:
        targets[:, -3:] = NOT_A_TARGET
    exact = logits.detach().double().requires_grad_()
    expected = 0.25 * F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    found = sum_nll(logits, targets, 0.25)
    (found * 3).backward()
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert logits.grad is not None and exact.grad is not None and logits.grad.dtype == dtype
    assert (logits.grad.double() - 3 * exact.grad).abs().max() < tolerance
    if shape[1] > 1:
        assert not logits.grad[:, -3:].any(), "padding has no gradient"
    with torch.no_grad():
        assert float(sum_nll(logits, targets)) == pytest.approx(4 * float(expected), rel=1e-6)


def test_what_is_no_number_stays_none() -> None:
    logits = torch.zeros(1, 2, 5)
    logits[0, 1, 3] = float("nan")
    assert sum_nll(logits, torch.tensor([[1, 2]])).isnan()
    assert not sum_nll(logits[:, :1], torch.tensor([[1]])).isnan()
