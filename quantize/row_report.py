"""What codecs would do to the rows of any table, from a random sample: for tables without their backbone. No torch.

Rows are drawn with replacement, uniformly over all of them; intervals are 95 %, from the spread between rows.

Shape letters: n drawn rows, D row width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders import checkpoint as checkpoints
from engram.kernels.codecs import Codec, CodecError, find_codec
from engram.quantize.package import open_source

_BLOCK = 8192


class RowReportError(EngramError):
    """A sample that nothing can be said from."""


def row_report(
    folder: Path, codecs: Sequence[str], sample: int, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Errors of each codec on `sample` rows of each layer, in bounded memory: relative to what is stored now.

    `rel_error` is sqrt(sum |x - x'|^2 / sum |x|^2), the worst and the 99th percentile are of single rows. Raises
    RowReportError for fewer than 100 rows, CodecError for a codec that cannot hold the width.
    """
    if sample < 100:
        raise RowReportError(f"a sample of {sample} rows says nothing", hint="draw at least 100")
    chosen = [find_codec(name) for name in codecs]
    seen = progress or Progress()
    layers = {}
    with open_source(folder) as (_, layout, tables):
        for codec in chosen:
            codec.row_bytes(layout.head_dim)
        for layer in layout.layers:
            rows = layout.table_rows[layer]
            drawn_n = np.sort(np.random.default_rng([seed, layer]).integers(0, rows, size=sample))
            lost: dict[str, list[NDArray[np.float64]]] = {codec.name: [] for codec in chosen}
            whole: list[NDArray[np.float64]] = []
            mapped = None if tables else checkpoints.open_checkpoint(folder).table(layer)
            with seen.task(f"layer {layer}", sample, "rows") as task:
                for begin in range(0, sample, _BLOCK):
                    part = drawn_n[begin : begin + _BLOCK]
                    if tables:
                        values_nD = np.empty((len(part), layout.head_dim), dtype=np.float32)
                        tables[layer].decode(part, values_nD)
                    else:
                        assert mapped is not None
                        values_nD = np.asarray(mapped[part])
                    whole.append(np.square(values_nD.astype(np.float64)).sum(1))
                    for codec in chosen:
                        with naming(codec, part, values_nD, layer):
                            encoded = codec.encode(values_nD)
                        made = codec.decode(encoded, layout.head_dim)
                        lost[codec.name].append(np.square(made - values_nD.astype(np.float64)).sum(1))
                    task.advance(len(part))
            total = np.concatenate(whole)
            layers[str(layer)] = {
                "rows": rows, "sampled": sample, "stored_as": tables[layer].codec_name if tables else "f32",
                "codecs": {
                    codec.name: _figures(np.concatenate(lost[codec.name]), total)
                    | {"bits_per_value": 8 * codec.row_bytes(layout.head_dim) / layout.head_dim}
                    for codec in chosen
                },
            }  # fmt: skip
    return {"sample": sample, "seed": seed, "confidence": 0.95, "layers": layers}


@contextmanager
def naming(codec: Codec, rows_n: NDArray[np.int64], values_nD: NDArray[np.float32], layer: int) -> Iterator[None]:
    """While drawn rows are encoded: a CodecError names the row of the table, not its place among these."""
    try:
        yield
    except CodecError:
        for place, row in enumerate(rows_n.tolist()):
            codec.encode(values_nD[place : place + 1], table=f"layer {layer}", first_row=row)
        raise


def _figures(lost_n: NDArray[np.float64], whole_n: NDArray[np.float64]) -> dict[str, Any]:
    """Relative error with its interval (ratio estimate, delta method), and how it spreads over rows."""
    whole = float(whole_n.mean())
    if not whole:
        return {"rel_error": 0.0, "ci95": [0.0, 0.0], "p99_row": 0.0, "worst_row": 0.0}
    ratio = float(lost_n.mean()) / whole
    spread = float((lost_n - ratio * whole_n).std(ddof=1)) / whole / math.sqrt(len(lost_n))
    rows_n = np.sqrt(np.divide(lost_n, whole_n, out=np.zeros_like(lost_n), where=whole_n > 0))
    return {
        "rel_error": math.sqrt(ratio),
        "ci95": [math.sqrt(max(0.0, ratio - 1.96 * spread)), math.sqrt(ratio + 1.96 * spread)],
        "p99_row": float(np.quantile(rows_n, 0.99)), "worst_row": float(rows_n.max()),
    }  # fmt: skip
