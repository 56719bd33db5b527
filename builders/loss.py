"""The loss over a large vocabulary, forward and gradient in one pass over blocks of positions.

Shape letters: N positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram.builders.data import NOT_A_TARGET

BLOCK = 128  # positions whose float32 logits are in memory at once: 25 MB for 49,152 tokens


class _SumNll(torch.autograd.Function):
    """Scaled sum of -log p; the gradient softmax - one-hot is written while the softmax is at hand."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, scale: float) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient_NV = torch.empty_like(logits_NV) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=logits_NV.device)
        for begin in range(0, len(logits_NV), BLOCK):
            here = slice(begin, begin + BLOCK)
            real = targets_N[here] != NOT_A_TARGET
            targets = targets_N[here].clamp_min(0).unsqueeze(1)
            log_p = logits_NV[here].to(torch.float32, copy=True)
            log_p -= log_p.logsumexp(1, keepdim=True)
            total -= (log_p.gather(1, targets).squeeze(1) * real).sum(dtype=torch.float64)
            if gradient_NV is not None:
                p = log_p.exp_()
                p.scatter_add_(1, targets, p.new_full(targets.shape, -1.0))
                gradient_NV[here] = p.mul_((real * scale).unsqueeze(1))
        if gradient_NV is not None:
            ctx.save_for_backward(gradient_NV)
        return (total * scale).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV if float(upstream[0]) == 1.0 else gradient_NV * upstream[0], None, None


def sum_nll(logits_BTV: Tensor, targets_BT: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` times the sum of -log p (nats) over targets that are not NOT_A_TARGET; arithmetic in float32.

    As cross_entropy(reduction="sum"), without its three float32 copies of the logits; the gradient has the dtype of the
    logits, and is scaled before it is rounded to it.
    """
    out: Tensor = _SumNll.apply(logits_BTV.flatten(0, 1), targets_BT.flatten(), scale)  # type: ignore[no-untyped-call]
    return out
