"""Quality of a memory on held-out text, always beside its controls: backbone alone, zero table, shuffled rows.

Shape letters: B windows (one), T positions, C columns, E memory width, R bootstrap samples, N documents, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram import EngramError, Progress
from engram.builders.corpus import CorpusConfig
from engram.builders.layout import Layout
from engram.builders.token_cache import TokenCache
from engram.runtime.engine import Model
from engram.runtime.intervals import over_documents
from engram.runtime.readout import Readout, nats

Ints = NDArray[np.int64]

ARMS = ("backbone", "memory", "zero_table", "shuffled_rows")
_SPREAD = 8  # documents that a small max_tokens is spread over where there are so many
_LEAST_DOCUMENTS = 2  # an interval over documents needs more than one


class EvaluateError(EngramError):
    """Text that nothing can be measured on."""


@dataclass(frozen=True)
class EvalConfig:
    """What to measure and on what.

    `max_tokens` are spread over as many documents as possible: each is read up to a common length, at least a window
    and at most `document_tokens`, in the order of their hashes. A document is cut into windows of `sequence` tokens,
    and every window is a text of its own (begun
    with bos where the tokenizer asks for one).
    """

    package: Path
    data: CorpusConfig
    max_tokens: int | None = None
    document_tokens: int = 2048
    sequence: int = 512
    offload: str = "disk"
    seed: int = 0
    bootstrap: int = 2000
    dtype: str | None = None
    verify: str = "first-touch"
    table_io: str = "auto"

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to predict."""
        for name, least in (("document_tokens", 2), ("sequence", 2), ("bootstrap", 100)):
            if getattr(self, name) < least:
                raise EvaluateError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise EvaluateError(f"max_tokens {self.max_tokens} must be at least 2")


@dataclass(frozen=True)
class Sample:
    """How much of a text to read; see EvalConfig. `documents`: these alone; `least`: fewer of them are an error."""

    max_tokens: int | None = None
    document_tokens: int = 2048
    sequence: int = 512
    documents: Sequence[int] | None = None
    least: int = _LEAST_DOCUMENTS


@dataclass
class Scores:
    """Sums over one document: predicted tokens, their UTF-8 bytes, and nats by arm."""

    tokens: int = 0
    bytes: int = 0
    nats: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ARMS, 0.0))


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Losses of all arms, and the gains over the backbone with a 95 % bootstrap interval over documents.

    Raises EvaluateError for too little text, and what package, corpus and reader raise.
    """
    seen = progress or Progress()
    with seen.task(f"open {config.package.name}"):
        model = Model.open(
            config.package,
            offload=config.offload,
            dtype=config.dtype,
            verify=config.verify,
            table_io=config.table_io,
        )
    try:
        cache = TokenCache.build(config.data, config.package / "tokenizer.json", seen)
        try:
            chosen = choose(cache, config)
            scored = _score_all(model, cache, chosen, config, seen)
            digest = hashlib.sha256(np.sort(cache.hashes()[[i for i, _ in chosen]]).tobytes()).hexdigest()
        finally:
            cache.discard()
    finally:
        model.close()
    return summary(scored, config) | {"documents_sha256": digest}


def choose(cache: TokenCache, config: EvalConfig | Sample) -> list[tuple[int, int]]:
    """(document, tokens of it to read), in the order of the documents' hashes."""
    lengths, chosen = cache.lengths(), []
    only, least = (config.documents, config.least) if isinstance(config, Sample) else (None, _LEAST_DOCUMENTS)
    among = np.arange(len(lengths)) if only is None else np.array(only, dtype=np.int64)
    left = int(lengths[among].sum()) if config.max_tokens is None else config.max_tokens
    window = min(config.sequence, max(2, left // _SPREAD))
    longest = min(config.document_tokens, max(window, common_length(lengths[among], left)))
    for i in among[np.argsort(cache.hashes()[among], kind="stable")]:
        tokens = min(int(lengths[i]), longest, left)
        if tokens >= 2:
            chosen.append((int(i), tokens))
            left -= tokens
    if len(chosen) < least:
        there = int((lengths[among] >= 2).sum())
        if there >= least:
            raise EvaluateError(
                f"{config.max_tokens} tokens are too few to read {least} documents", hint="let more tokens be read"
            )
        raise EvaluateError(
            f"the data has {there} documents of at least 2 tokens, {least} are needed"
            + (" for an interval" if least > 1 else ""),
            hint="give more documents: files, or lines of a .jsonl file",
        )
    return chosen


def common_length(lengths_N: NDArray[Any], total: int) -> int:
    """The largest L for which sum(min(length, L)) is at most `total`."""
    low, high = 0, int(lengths_N.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(np.minimum(lengths_N, middle).sum()) <= total else (low, middle - 1)
    return low


def shuffled(rows: Mapping[int, Ints], layout: Layout, seed: int) -> dict[int, Ints]:
    """The same lookups with the rows of every head permuted: r → (a r + b) mod p, a bijection because p is prime."""
    generator = np.random.default_rng(seed)
    out = {}
    for layer in layout.layers:
        primes = np.array([p for heads in layout.primes[layer] for p in heads], dtype=np.int64)
        factor_C = np.array([generator.integers(max(1, p // 3), max(2, p)) for p in primes], dtype=np.int64)
        shift_C = np.array([generator.integers(0, p) for p in primes], dtype=np.int64)
        if layer not in rows:  # drawn all the same, so that a layer's permutation does not depend on what is asked for
            continue
        local_BTC = rows[layer] - layout.offsets(layer)
        out[layer] = (local_BTC * factor_C + shift_C) % primes + layout.offsets(layer)
    return out


def arms(model: Model, ids_BT: Ints, seed: int) -> Iterator[tuple[str, Callable[[], Mapping[int, Tensor]] | None]]:
    """By arm, what gives the memory of every layer [B, T, E]; None for the backbone alone."""
    rows = model.layout.rows(ids_BT)
    width = model.layout.memory_width
    yield "backbone", None
    yield "memory", lambda: model.memory(rows)
    yield "zero_table", lambda: {n: torch.zeros(*ids_BT.shape, width) for n in model.layout.layers}
    yield "shuffled_rows", lambda: model.memory(shuffled(rows, model.layout, seed))


class Scorer:
    """Nats of a window under every arm."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.readout = Readout(model.engram)

    def __call__(self, ids_BT: Ints) -> dict[str, float]:
        ids, found = torch.from_numpy(ids_BT), {}
        with torch.inference_mode():
            base_TD = self.readout.base(ids)
            for name, memory in arms(self.model, ids_BT, self.seed):
                states_TD = base_TD if memory is None else self.readout.states(ids, memory(), base_TD)
                found[name] = float(nats(self.readout, states_TD, ids).sum(dtype=torch.float64))
        return found


def _score_all(
    model: Model, cache: TokenCache, chosen: list[tuple[int, int]], config: EvalConfig, progress: Progress
) -> list[Scores]:
    score = Scorer(model, config.seed)
    bos = np.array(model.begin(), dtype=np.int64)
    length = min(config.sequence, model.context - len(bos))
    out = []
    with progress.task("evaluate", sum(tokens for _, tokens in chosen), "tokens") as task:
        for document, tokens in chosen:
            ids = cache.document(document)[:tokens].astype(np.int64)
            scores = Scores()
            for begin in range(0, tokens, length):
                piece = ids[begin : begin + length]
                window = np.concatenate([bos, piece])
                if len(window) >= 2:
                    for name, found in score(window[None]).items():
                        scores.nats[name] += found
                    scores.tokens += len(window) - 1
                    scores.bytes += len(model.tokenizer.decode(window[1:].tolist(), skip_special_tokens=False).encode())
                task.advance(len(piece))
            out.append(scores)
    return out


def summary(scored: list[Scores], config: EvalConfig) -> dict[str, Any]:
    """Means over all tokens, and gains with intervals, from the sums of each document."""
    tokens_N = np.array([s.tokens for s in scored], dtype=np.float64)
    size = sum(s.bytes for s in scored)
    lost = {name: np.array([s.nats[name] for s in scored]) for name in ARMS}
    result: dict[str, Any] = {"tokens": int(tokens_N.sum()), "documents": len(scored), "bytes": size}
    for name in ARMS:
        mean = float(lost[name].sum() / tokens_N.sum())
        bits = float(lost[name].sum() / math.log(2) / max(1, size))
        result[name] = {"nll": mean, "ppl": math.exp(min(mean, 700.0)), "bpb": bits}
    for name, key in (("memory", "gain"), ("zero_table", "gain_zero_table"), ("shuffled_rows", "gain_shuffled_rows")):
        gained_N = lost["backbone"] - lost[name]
        low, high = over_documents(gained_N, tokens_N, config.seed, config.bootstrap)
        result[key] = {"nll": float(gained_N.sum() / tokens_N.sum()), "ci95": [low, high]}
    return result
