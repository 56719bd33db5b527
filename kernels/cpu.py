"""The operations of reference.py in C++ (kernels/csrc): same names, same signatures, the same bits.

Shape letters: N rows of a table, K bytes a row, C columns, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.kernels import _C, reference
from engram.kernels.codecs import Bytes, Codec
from engram.kernels.reference import (
    Convolution,
    Flags,
    Ints,
    KernelError,
    id_outside,
    prepare_gather,
    row_outside,
)

Singles = NDArray[np.float32]
KINDS = {"plain": 0, "sqrt": 1, "copysign": 2}  # GateKind in csrc/gate.h


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
        wrong = _C.gather(codec.code, codec.factor, table_NK, rows, out, width, threads)
        if wrong >= 0:
            raise row_outside(rows, wrong, len(table_NK))
    return out


class Hasher(reference.Hasher):
    """Token ids to row ids in one pass: `rows` of reference.Hasher in C++, from the same constants."""

    def __init__(self, **constants: Any) -> None:
        super().__init__(**constants)
        self._hasher = _C.Hasher(
            token_map=None if self.token_map is None else np.ascontiguousarray(self.token_map),
            vocab_size=self.vocab_size, negative_ids=self.negative_ids, orders=list(self.orders), heads=self.heads,
            multipliers=[list(m) for m in self.multipliers], primes=[list(p) for p in self.primes],
            offsets=[list(map(int, o)) for o in self.offsets], dead_ids=list(self.dead_ids),
            dead_negative=self.dead_negative, reset_id=self.reset_id, fill=self.fill,
        )  # fmt: skip

    def rows(
        self,
        ids_BT: Ints,
        start_BT: Flags | None,
        past_ids_BJ: Ints,
        past_start_BJ: Flags,
        past_stop_BJ: Flags,
        layers: Sequence[int],
        local: bool,
    ) -> list[Ints]:
        """Row ids [B, T, C] of each of the layers; KernelError for an id outside the vocabulary."""
        ids_BT = np.ascontiguousarray(ids_BT)
        out = [np.empty((*ids_BT.shape, len(self.orders) * self.heads), dtype=np.int64) for _ in layers]
        wrong = self._hasher.rows(
            ids_BT, None if start_BT is None else np.ascontiguousarray(start_BT), np.ascontiguousarray(past_ids_BJ),
            np.ascontiguousarray(past_start_BJ), np.ascontiguousarray(past_stop_BJ), list(layers), local, out,
        )  # fmt: skip
        if wrong >= 0:
            raise id_outside(ids_BT, self.vocab_size)
        return out


def scatter_add(rows_N: Ints, values_ND: NDArray[np.float32]) -> tuple[Ints, NDArray[np.float32]]:
    """Distinct rows, ascending, and the sum of each one's values; see reference.scatter_add."""
    if rows_N.dtype != np.int64 or values_ND.dtype != np.float32 or len(rows_N) != len(values_ND):
        raise KernelError(
            f"scatter_add takes int64 [N] and float32 [N, D], found {rows_N.dtype} {list(rows_N.shape)} and "
            f"{values_ND.dtype} {list(values_ND.shape)}"
        )
    rows_U, sums_UD = _C.scatter_add(np.ascontiguousarray(rows_N), np.ascontiguousarray(values_ND))
    return rows_U, sums_UD


def crc32_pages(pages_PX: Bytes) -> NDArray[np.uint32]:
    """CRC-32 of every page, as zlib computes it: uint8 [P, X] to uint32 [P]."""
    out = np.empty(len(pages_PX), dtype=np.uint32)
    _C.crc32_pages(np.ascontiguousarray(pages_PX), out, False)
    return out


def gate_step(
    hidden_BTMD: Singles,
    key_BTMD: Singles,
    value_BTD: Singles,
    query_norm_MD: Singles,
    key_norm_MD: Singles,
    *,
    kind: str,
    eps: float,
    conv: Convolution | None = None,
    past_BPX: Singles | None = None,
    mask_BT: Flags | None = None,
) -> tuple[Singles, Singles | None]:
    """What reference.gate_step gives, from contiguous float32 arrays; made for few positions (one thread).

    Sums are fp64, the rest is fp32: results lie within 1e-6 of the largest value from the fp64 reference, which is what
    rounding each product, each tap and the exponential to fp32 costs. KernelError for arrays of another kind.
    """
    batch, length, branches, width = hidden_BTMD.shape
    wide = branches * width
    wanted = [("hidden", hidden_BTMD, hidden_BTMD.shape), ("key", key_BTMD, hidden_BTMD.shape),
              ("value", value_BTD, (batch, length, width)), ("query norm", query_norm_MD, (branches, width)),
              ("key norm", key_norm_MD, (branches, width))]  # fmt: skip
    inputs = None
    if conv is not None:
        inputs = np.empty((batch, length, wide), dtype=np.float32)
        wanted += [("conv norm", conv.norm_MD, (branches, width)),
                   ("conv weight", conv.weight_XW, (wide, conv.weight_XW.shape[-1]))]  # fmt: skip
        if past_BPX is not None:
            wanted.append(("past", past_BPX, (batch, past_BPX.shape[1], wide)))
    for name, array, shape in wanted:
        if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
            raise KernelError(
                f"{name} must be contiguous float32 {list(shape)}, found {array.dtype} {list(array.shape)}"
            )
    if kind not in KINDS:
        raise KernelError(f"gate kind {kind!r} is not known", hint="use one of: " + ", ".join(KINDS))
    out = np.empty_like(hidden_BTMD)
    _C.gate_step(
        hidden_BTMD, key_BTMD, value_BTD, query_norm_MD, key_norm_MD, eps, KINDS[kind],
        None if mask_BT is None else np.ascontiguousarray(mask_BT), None if conv is None else conv.norm_MD,
        None if conv is None else conv.weight_XW, 1 if conv is None else conv.dilation,
        0.0 if conv is None else conv.eps, None if conv is None else past_BPX, out, inputs,
    )  # fmt: skip
    return out, inputs
