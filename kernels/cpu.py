"""The operations of reference.py in C++ (kernels/csrc): same names, same signatures, the same bits.

Shape letters: N rows of a table, K bytes a row, C columns, D width.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from engram.kernels import _C
from engram.kernels.codecs import Bytes, Codec
from engram.kernels.reference import Ints, prepare_gather, row_outside


def gather(
    codec: Codec,
    table_NK: Bytes,
    rows: Ints,
    out: NDArray[Any] | None = None,
    *,
    width: int | None = None,
    threads: int = 1,
) -> NDArray[Any]:
    """Rows of a table in memory, decoded, those of the last axis side by side; `threads` 0 takes all that there are."""
    rows, out, width = prepare_gather(codec, table_NK, rows, out, width)
    if rows.size:
        wrong = _C.gather(codec.code, table_NK, rows, out, width, threads)
        if wrong >= 0:
            raise row_outside(rows, wrong, len(table_NK))
    return out
