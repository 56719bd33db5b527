"""How many n-grams share a row of their table: expected, measured, and the number of rows that keeps it in bounds.

"Share of distinct n-grams" counts an n-gram as colliding in a head when at least one other n-gram of the corpus has the
same row there; "share of lookups" weighs each by how often it occurs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.layout import Layout
from engram.builders.ngram_counts import NgramCounts

ROWS_AT_ONCE = 1 << 23  # of the heads that are measured in one pass: 12 bytes each
FEWEST_ROWS = 256
FLOAT_BYTES = 4


@dataclass(frozen=True)
class RowChoice:
    """Rows per head (where the search for primes starts) and which limit decided: "target", "budget" or "given"."""

    rows_per_head: int
    decided_by: str


def expected_share(distinct: int, rows: int) -> float:
    """Expected share of `distinct` n-grams that share a row, each on one of `rows` rows at random."""
    return 0.0 if distinct < 2 else -math.expm1((distinct - 1) * math.log1p(-1.0 / rows)) if rows > 1 else 1.0


def choose_rows(distinct: int, target: float, budget_bytes: int, columns: int, head_dim: int) -> RowChoice:
    """The fewest rows per head that keep the expected share of `distinct` n-grams within `target`, inside the budget.

    distinct: of the order that has most; one number of rows serves all orders. budget_bytes: for all tables together
    as float32; columns: heads of all orders and layers. Never below FEWEST_ROWS.
    """
    wanted = max(FEWEST_ROWS, math.ceil(-max(distinct - 1, 1) / math.log1p(-target)))
    primes_climb = 64 + 24 * columns  # the primes lie above the number that the search starts from
    afforded = budget_bytes // (columns * head_dim * FLOAT_BYTES) - primes_climb
    if wanted <= afforded:
        return RowChoice(wanted, "target")
    return RowChoice(max(FEWEST_ROWS, afforded), "budget")


def measure(counts: NgramCounts, layout: Layout, progress: Progress = Progress()) -> dict[str, dict[str, Any]]:
    """Collision shares of the first layer with its real hash, by order.

    Each value holds `heads`: [{rows, share_of_distinct, share_of_lookups}], their means, and `rows_sampled`: 1, or the
    share of rows that were looked at where one head has more than ROWS_AT_ONCE (an estimate then).
    """
    layer = layout.layers[0]
    out: dict[str, dict[str, Any]] = {}
    groups = [
        (order, group)
        for order, primes in zip(layout.orders, layout.primes[layer], strict=True)
        for group in _groups(primes)
    ]
    with progress.task("measure collisions", len(groups), "groups of heads") as task:
        for order, group in groups:
            heads = out.setdefault(str(order), {"heads": []})["heads"]
            heads += _measure_group(counts, order, group)
            task.advance(1)
    for result in out.values():
        for name in ("share_of_distinct", "share_of_lookups"):
            result[name] = float(np.mean([head[name] for head in result["heads"]]))
        result["rows_sampled"] = min(1.0 / _stride(head["rows"]) for head in result["heads"])
    return out


def _groups(primes: tuple[int, ...]) -> list[list[int]]:
    """Heads that are measured together, so that their counters stay small."""
    groups: list[list[int]] = [[]]
    for prime in primes:
        if groups[-1] and sum(-(-p // _stride(p)) for p in [*groups[-1], prime]) > ROWS_AT_ONCE:
            groups.append([])
        groups[-1].append(prime)
    return groups


def _stride(prime: int) -> int:
    return -(-prime // ROWS_AT_ONCE)


def _measure_group(counts: NgramCounts, order: int, primes: list[int]) -> list[dict[str, Any]]:
    sizes = [-(-prime // _stride(prime)) for prime in primes]
    distinct = [np.zeros(size, dtype=np.uint32) for size in sizes]
    lookups = [np.zeros(size, dtype=np.float64) for size in sizes]
    for keys, weights in counts.parts(order):
        mixed = counts.mixes(keys, order)
        for head, prime in enumerate(primes):
            rows, seen = mixed - mixed // prime * prime, weights  # the modulo, faster than numpy's; mixes are >= 0
            if (stride := _stride(prime)) > 1:
                chosen = rows % stride == 0
                rows, seen = rows[chosen] // stride, weights[chosen]
            distinct[head] += np.bincount(rows, minlength=sizes[head]).astype(np.uint32)
            lookups[head] += np.bincount(rows, weights=seen, minlength=sizes[head])
    out = []
    for head, prime in enumerate(primes):
        alone = distinct[head] == 1
        all_distinct, all_lookups = int(distinct[head].sum()), float(lookups[head].sum())
        out.append(
            {
                "rows": prime,
                "share_of_distinct": 1.0 - float(alone.sum()) / max(all_distinct, 1),
                "share_of_lookups": 1.0 - float(lookups[head][alone].sum()) / max(all_lookups, 1.0),
            }
        )
    return out
