"""What a corpus says about a hash layout: distinct n-grams, Zipf curve, collisions, bytes of the tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.collisions import expected_share, measure
from engram.builders.layout import Layout
from engram.builders.ngram_counts import NgramCounts
from engram.builders.vocab import representatives
from engram.kernels.codecs import CODECS, CodecError

RANKS = {"1k": 1_000, "64k": 65_536, "1M": 1_000_000}
CURVE_POINTS = 64


def gather(counts: NgramCounts, layout: Layout, progress: Progress = Progress()) -> dict[str, Any]:
    """The statistics of counted n-grams under a layout, as JSON.

    `estimates` names what is not exact: orders whose n-grams do not fit 64 bits, collision shares from sampled rows.
    """
    orders = counts.orders
    collisions = measure(counts, layout, progress)
    layers = {str(layer): sum(map(sum, layout.primes[layer])) for layer in layout.layers}
    estimates = [f"distinct {n}-grams: keyed by a 63-bit mix" for n, order in orders.items() if not order.exact]
    estimates += [
        f"collisions of {n}-grams: {result['rows_sampled']:.2g} of the rows sampled"
        for n, result in collisions.items()
        if result["rows_sampled"] < 1
    ]
    return {
        "distinct_ngrams": {str(n): order.distinct for n, order in orders.items()},
        "zipf": {str(n): _zipf(order.distinct, order.coverage) for n, order in orders.items()},
        "collisions": {"layer": layout.layers[0], "orders": collisions},
        "expected_collisions": {
            str(n): expected_share(orders[n].distinct, primes[0])
            for n, primes in zip(layout.orders, layout.primes[layout.layers[0]], strict=True)
        },
        "used_rows": layers,
        "table_bytes": table_bytes(layout),
        "estimates": estimates,
    }


def table_bytes(layout: Layout) -> dict[str, int]:
    """Bytes of all tables together, by row codec; a codec that cannot hold the width is left out."""
    out = {}
    for name, codec in CODECS.items():
        try:
            out[name] = codec.row_bytes(layout.head_dim) * sum(layout.table_rows.values())
        except CodecError:
            continue
    return out


def top_ngrams(counts: NgramCounts, layout: Layout) -> dict[str, NDArray[Any]]:
    """The most frequent n-grams of every order, most frequent first.

    For each order n: `tokens_n` I32 [K, n], raw ids in reading order (of a compressed id the lowest raw id, so that
    hashing them with the layout gives the n-gram's rows); `compressed_n` I32 [K, n]; `counts_n` I64 [K].
    """
    out: dict[str, NDArray[Any]] = {}
    lowest = None if layout.token_map is None else representatives(layout.token_map)
    for n, order in counts.orders.items():
        compressed = counts.top_tokens(n)
        out[f"tokens_{n}"] = (compressed if lowest is None else lowest[compressed]).astype(np.int32)
        out[f"compressed_{n}"] = compressed.astype(np.int32)
        out[f"counts_{n}"] = order.top_counts.astype(np.int64)
    return out


def tables(result: dict[str, Any], progress: Progress) -> None:
    """Show the statistics as tables."""
    lines = []
    for n, zipf in result["zipf"].items():
        shares = [f"{100 * zipf['covered'][name]:.1f} %" for name in RANKS]
        collisions = result["collisions"]["orders"][n]
        lines.append(
            [
                f"{n}-grams", f"{result['distinct_ngrams'][n]:,}", *shares,
                f"{100 * collisions['share_of_distinct']:.2f} %", f"{100 * collisions['share_of_lookups']:.2f} %",
            ]
        )  # fmt: skip
    columns = ["", "distinct", *(f"top {name} cover" for name in RANKS), "share a row", "of lookups"]
    progress.table("N-grams", columns, lines)
    heads = result["collisions"]["orders"]
    progress.table(
        f"Share of distinct n-grams (of lookups) that share their row, layer {result['collisions']['layer']}",
        ["head", *(f"{n}-grams" for n in heads)],
        [
            [str(h), *(_shares(heads[n]["heads"][h]) for n in heads)]
            for h in range(min(len(order["heads"]) for order in heads.values()))
        ],
    )
    progress.table("Tables", ["codec", "bytes"], [[name, f"{size:,}"] for name, size in result["table_bytes"].items()])
    for estimate in result["estimates"]:
        progress.say(f"estimate: {estimate}")


def _shares(head: dict[str, float]) -> str:
    return f"{100 * head['share_of_distinct']:.2f} % ({100 * head['share_of_lookups']:.2f} %)"


def _zipf(distinct: int, coverage: Any) -> dict[str, Any]:
    ranks = sorted({int(rank) for rank in np.geomspace(1, max(distinct, 1), CURVE_POINTS).round()})
    return {
        "covered": dict(zip(RANKS, coverage(list(RANKS.values())), strict=True)),
        "curve": {"rank": ranks, "share": coverage(ranks)},
    }
