"""`engram bench hash`: tokens/s of hashing, beside the NumPy reference and the published demo's way of doing it.

Shape letters: B batch, T tokens, C columns, K look-back distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.layout import Layout
from engram.kernels import dispatch
from engram.runtime import bench_trace
from engram.runtime.bench_race import BenchError, Contender, Ints, ParityError, Trace, gate, race, ratio

OURS, REFERENCE, DEMO = "engram", "numpy reference", "published demo's method"
ROUNDS = 7
_GATE_TOKENS = 512


@dataclass(frozen=True)
class BenchHashConfig:
    """What `engram bench hash` needs to know."""

    folder: Path
    text: Path | None = None
    tokens: tuple[int, ...] = (1, 512, 8192)  # of a call
    seconds: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.tokens or min(self.tokens) < 1 or self.seconds <= 0:
            raise BenchError(f"tokens {list(self.tokens)} must be at least 1 and seconds {self.seconds} above 0")


def demo_hash(layout: Layout, ids_BT: Ints) -> dict[int, Ints]:
    """Rows by layer, int64 [B, T, C], the way the published demo works, written anew from its description.

    Every layer shifts the ids once for each distance by a padded copy, mixes each order from its start, takes one
    modulo a head, and stacks the heads at the end.
    """
    compressed = ids_BT.copy()
    if layout.token_map is not None:
        known = ids_BT >= 0
        compressed[known] = layout.token_map[ids_BT[known]]
        pad = int(layout.token_map[layout.pad_id])
    else:
        pad = layout.pad_id
    length = ids_BT.shape[1]
    out = {}
    for layer in layout.layers:
        multipliers = np.array(layout.multipliers[layer], dtype=np.int64)
        shifted = [
            compressed if not k else np.pad(compressed, ((0, 0), (k, 0)), constant_values=pad)[:, :length]
            for k in range(layout.orders[-1])
        ]
        columns = []
        for order, primes in zip(layout.orders, layout.primes[layer], strict=True):
            mix = shifted[0] * multipliers[0]
            for k in range(1, order):
                mix = np.bitwise_xor(mix, shifted[k] * multipliers[k])
            columns += [(mix % prime).astype(np.int64, copy=False) for prime in primes]
        out[layer] = np.stack(columns, axis=2) + layout.offsets(layer)
    return out


def contenders(layout: Layout) -> tuple[list[Contender], dict[str, str]]:
    """Everybody who hashes as the layout says, and why others do not. Calls take ids [T] and give rows by layer."""

    def stacked(rows: dict[int, Ints]) -> NDArray[Any]:
        return np.stack([rows[layer][0] for layer in layout.layers], axis=1)

    def ours(ids: Ints) -> dict[int, Ints]:
        return layout.rows(ids[None])

    def reference(ids: Ints) -> dict[int, Ints]:
        with dispatch.force("reference"):
            return layout.rows(ids[None])

    def demo(ids: Ints) -> dict[int, Ints]:
        return demo_hash(layout, ids[None])

    found = [Contender(name, call, reference, kind="rows", shown=stacked)
             for name, call in ((OURS, ours), (REFERENCE, reference))]  # fmt: skip
    left_out = {}
    if layout.dialect == "demo" and not layout.dead_ids:
        found.append(Contender(DEMO, demo, reference, kind="rows", shown=stacked))
    else:
        left_out[DEMO] = f"it hashes the demo dialect without dead ids, this layout is {layout.dialect}"
    return found, left_out


def bench_hash(config: BenchHashConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Gate, then time; the object of `engram bench hash --json`. Raises LayoutError, BenchError, ParityError."""
    progress = progress or Progress()
    layout = Layout.load(config.folder)
    texts, source = bench_trace.real_text(config.text, progress)
    ids = bench_trace.token_ids(config.folder, texts, progress)
    taking_part, left_out = contenders(layout)
    for begin in (0, max(0, len(ids) - _GATE_TOKENS)):
        gate_rows(taking_part, ids[begin : begin + _GATE_TOKENS])
    results = []
    turn_s = config.seconds / (ROUNDS * len(config.tokens) * len(taking_part))
    with progress.task("hash", ROUNDS * len(config.tokens) * len(taking_part), "turns") as task:
        for count in config.tokens:
            times = race(taking_part, Trace(ids).draw, count, rounds=ROUNDS, turn_s=turn_s, seed=config.seed, task=task)
            results += [
                {"name": name, "tokens": count, "tokens_per_second": count / timing.median,
                 "us_per_call": 1e6 * timing.median, "calls": timing.calls,
                 "times_the_demo": _inverse(ratio(times, name, DEMO)),
                 "times_the_reference": _inverse(ratio(times, name, REFERENCE))}
                for name, timing in times.items()
            ]  # fmt: skip
    return {
        "folder": config.folder, "dialect": layout.dialect, "layers": list(layout.layers), "columns": layout.columns,
        "kernels": dispatch.name(), "text": {"source": source, "tokens": len(ids)}, "parity": len(taking_part),
        "results": results, "left_out": left_out,
    }  # fmt: skip


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def gate_rows(taking_part: Sequence[Contender], ids: Ints) -> None:
    """Everybody's rows against the reference; ParityError where they differ."""
    try:
        gate(taking_part, ids)
    except ParityError as wrong:
        raise ParityError(f"row ids: {wrong}", hint=wrong.hint) from None
