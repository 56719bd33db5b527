"""Scales of a filled memory: fitted on one set of documents, reported on another.

Shape letters: T positions, K candidate tokens, O orders, d row width, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram import EngramError, Progress
from engram.builders.fill_statistics import Directions
from engram.builders.layout import Layout

CANDIDATES = 128  # tokens a position whose logits are followed while fitting; the rest keep their mass
STRENGTHS = (0.25, 1.0, 4.0)  # shrinkage constants k that are tried
_WINDOW = 512
_BLOCK = 512
_FIRST_SCALE = 2.0


class FitError(EngramError):
    """Scales that cannot be fitted."""


@dataclass(frozen=True)
class Scored:
    """Positions with all that is known of them: states [T, D], next tokens [T], each column's sums [T, d] and counts
    [T], and the unembedding [V, D]."""

    states_TD: Tensor
    next_T: Tensor
    sums: list[Tensor]
    seen: list[Tensor]
    head_VD: Tensor


@dataclass(frozen=True)
class Fitted:
    """Shrinkage constant and one scale an order."""

    k: float
    scales: list[float]


def final_states(
    backbone: Any, texts: list[NDArray[np.int32]], progress: Progress, first: Sequence[int] = ()
) -> Tensor:
    """What the unembedding is applied to at every position but the last of each text: float32 [T, D].

    Texts are read in windows of 512 tokens; each begins anew, with the ids `first`, as evaluation does.
    """
    out = []
    with progress.task("final states", sum(map(len, texts)), "tokens") as task, torch.inference_mode():
        for text in texts:
            ids = torch.from_numpy(text.astype(np.int64))
            begun = torch.tensor([list(first)], dtype=torch.int64)
            states = []
            for begin in range(0, len(text), _WINDOW):
                window = ids[None, begin : begin + _WINDOW]
                whole = torch.cat([begun, window], dim=1)
                found = backbone.base_model(input_ids=whole, use_cache=False).last_hidden_state
                states.append(found[0, len(first) :].float())
                task.advance(window.shape[1])
            out.append(torch.cat(states)[:-1])
    return torch.cat(out)


def order_shift(scored: Scored, layout: Layout, directions: Directions, order: int, k: float) -> Tensor:
    """What one order adds to the final state at scale 1: [T, D]."""
    total = torch.zeros_like(scored.states_TD)
    for head in range(layout.heads):
        column = order * layout.heads + head
        rows_Td = scored.sums[column] / (scored.seen[column] + k).unsqueeze(1)
        total += rows_Td @ torch.from_numpy(directions.back_HdD[head])
    return total


@dataclass(frozen=True)
class _Candidates:
    """The likeliest tokens of every position, the next one first, and the log-mass of all others."""

    ids_TK: Tensor
    logp_TK: Tensor
    rest_T: Tensor


def _candidates(scored: Scored) -> _Candidates:
    ids, logs, rest = [], [], []
    for begin in range(0, len(scored.next_T), _BLOCK):
        next_T = scored.next_T[begin : begin + _BLOCK, None]
        logp_TV = torch.log_softmax(scored.states_TD[begin : begin + _BLOCK] @ scored.head_VD.T, dim=-1)
        own = logp_TV.gather(1, next_T)
        logp_TV.scatter_(1, next_T, -math.inf)
        top, place = logp_TV.topk(min(CANDIDATES, logp_TV.shape[1] - 1), dim=-1)
        kept = torch.cat([own, top], dim=1)
        ids.append(torch.cat([next_T, place], dim=1))
        logs.append(kept)
        rest.append((1 - kept.exp().sum(1)).clamp_min(1e-9).log())
    return _Candidates(torch.cat(ids), torch.cat(logs), torch.cat(rest))


def fit(scored: Scored, layout: Layout, directions: Directions, progress: Progress) -> Fitted:
    """The k of STRENGTHS and the scales with the least loss over the candidates' renormalised distribution."""
    with torch.no_grad():
        candidates = _candidates(scored)
    best: tuple[float, Fitted] | None = None
    with progress.task("fit scales", len(STRENGTHS)) as task:
        for k in STRENGTHS:
            with torch.no_grad():
                moved_OTK = torch.stack(
                    [_moved(scored, candidates, order_shift(scored, layout, directions, o, k))
                     for o in range(len(layout.orders))]
                )  # fmt: skip
            loss, scales = _minimise(candidates, moved_OTK)
            if math.isfinite(loss) and (best is None or loss < best[0]):
                best = (loss, Fitted(k, scales))
            task.advance(1)
    if best is None:
        raise FitError("no finite loss was found while fitting the scales", hint="is the backbone's output finite?")
    return best[1]


def _moved(scored: Scored, candidates: _Candidates, shift_TD: Tensor) -> Tensor:
    """Change of the candidates' logits [T, K]."""
    out = torch.empty(candidates.ids_TK.shape)
    for begin in range(0, len(out), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        out[block] = torch.bmm(scored.head_VD[candidates.ids_TK[block]], shift_TD[block, :, None])[..., 0]
    return out


def _minimise(candidates: _Candidates, moved_OTK: Tensor) -> tuple[float, list[float]]:
    scales = torch.full((moved_OTK.shape[0],), _FIRST_SCALE, requires_grad=True)
    optimizer = torch.optim.LBFGS([scales], lr=0.5, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        logits = candidates.logp_TK + torch.tensordot(scales, moved_OTK, 1)
        norm = torch.logsumexp(torch.cat([logits, candidates.rest_T[:, None]], dim=1), dim=1)
        out: Tensor = (norm - logits[:, 0]).mean()
        return out

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float(loss()), [float(scale) for scale in scales]


def report(scored: Scored, layout: Layout, directions: Directions, fitted: Fitted, seed: int) -> dict[str, Any]:
    """Exact perplexities on documents that took no part: backbone, filled, and rows given to the wrong positions."""
    with torch.no_grad():
        shift = torch.zeros_like(scored.states_TD)
        for order, scale in enumerate(fitted.scales):
            shift += scale * order_shift(scored, layout, directions, order, fitted.k)
        mixed = shift[torch.randperm(len(shift), generator=torch.Generator().manual_seed(seed))]
        nats = {
            "backbone": _nll(scored, None), "filled": _nll(scored, shift), "shuffled_positions": _nll(scored, mixed)
        }  # fmt: skip
    return {"test_tokens": len(scored.next_T), "test_ppl": {name: math.exp(value) for name, value in nats.items()}}


def _nll(scored: Scored, shift_TD: Tensor | None) -> float:
    total = 0.0
    for begin in range(0, len(scored.next_T), _BLOCK):
        block = slice(begin, begin + _BLOCK)
        state = scored.states_TD[block] if shift_TD is None else scored.states_TD[block] + shift_TD[block]
        total += float(
            torch.nn.functional.cross_entropy(state @ scored.head_VD.T, scored.next_T[block], reduction="sum")
        )
    return total / len(scored.next_T)
