"""The operations of reference.py in C++ (kernels/csrc): same names, same signatures, the same bits.

Shape letters: N rows of a table, K bytes a row, C columns, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.kernels import _C, reference
from engram.kernels.codecs import Bytes, Codec, CodecError
from engram.kernels.reference import (
    Doubles,
    Flags,
    Ints,
    KernelError,
    Singles,
    check_error_rows,
    id_outside,
    prepare_gather,
    row_outside,
)

_WIDEST = 4096  # values of a row, in a table file and in the C++ decoders
_LEAST_SLICE = 256  # rows that NumPy encodes at a time where several threads do
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


def encode(
    codec: Codec, rows_ND: Singles, *, table: str = "table", first_row: int = 0, threads: int = 1
) -> Bytes:
    """reference.encode on up to `threads` threads (0: all that there are); codecs without C++ go to NumPy in slices.

    C++ says only that something is wrong; NumPy then goes over the rows and finds the words.
    """
    if rows_ND.ndim == 2 and rows_ND.dtype == np.float32 and rows_ND.shape[1]:
        if not _C.can_encode(codec.code):
            return _encode_slices(codec, rows_ND, table, first_row, threads or _C.available_threads())
        if rows_ND.strides[1] != 4 or rows_ND.strides[0] % 4:
            rows_ND = np.ascontiguousarray(rows_ND)
        try:
            out = np.empty((len(rows_ND), codec.row_bytes(rows_ND.shape[1])), dtype=np.uint8)
        except CodecError:  # of the width; a value that is not finite comes first
            return codec.encode(rows_ND, table=table, first_row=first_row)
        if _C.encode(codec.code, rows_ND, out, threads):
            return out
    return codec.encode(rows_ND, table=table, first_row=first_row)


def _encode_slices(codec: Codec, rows_ND: Singles, table: str, first_row: int, threads: int) -> Bytes:
    """NumPy lets go of Python's lock while it works on an array, so that slices go on beside each other."""
    step = max(_LEAST_SLICE, -(-len(rows_ND) // max(threads, 1)))
    slices = [rows_ND[begin : begin + step] for begin in range(0, len(rows_ND), step)]
    if len(slices) > 1:
        with ThreadPoolExecutor(threads) as pool:
            try:
                return np.concatenate(list(pool.map(codec.encode, slices)))
            except CodecError:
                pass  # which of several errors is named does not depend on the slices
    return codec.encode(rows_ND, table=table, first_row=first_row)


def row_errors(codec: Codec, bytes_NK: Bytes, rows_ND: Singles, *, threads: int = 1) -> tuple[Doubles, Doubles]:
    """reference.row_errors on up to `threads` threads (0: all that there are), block by block in the nearest cache."""
    check_error_rows(codec, bytes_NK, rows_ND)
    known = rows_ND.shape[1] <= _WIDEST and _C.row_bytes(codec.code, rows_ND.shape[1]) == bytes_NK.shape[-1]
    if not known or bytes_NK.ndim != 2 or bytes_NK.dtype != np.uint8:
        return reference.row_errors(codec, bytes_NK, rows_ND)
    lost, whole = np.empty(len(rows_ND)), np.empty(len(rows_ND))
    encoded, rows = np.ascontiguousarray(bytes_NK), np.ascontiguousarray(rows_ND)
    _C.row_errors(codec.code, codec.factor, encoded, rows, lost, whole, threads)
    return lost, whole


class Hasher(reference.Hasher):
    """Token ids to row ids in one pass: `rows` of reference.Hasher in C++, from the same constants."""

    def __init__(self, **constants: Any) -> None:
        super().__init__(**constants)
        self._hasher = _C.Hasher(
            token_map=None if self.token_map is None else np.ascontiguousarray(self.token_map),
            vocab_size=self.vocab_size, negative_ids=self.negative_ids, orders=list(self.orders), heads=self.heads,
            multipliers=[list(m) for m in self.multipliers], primes=[list(p) for p in self.primes],
            offsets=[list(map(int, o)) for o in self.offsets], dead_ids=list(self.dead_ids),
            dead_negative=self.dead_negative, reset_id=self.reset_id, fill=self.fill, sums=self.sums,
            oldest_first=self.oldest_first,
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
        shape = (len(layers), *ids_BT.shape, len(self.orders) * self.heads)
        out = list(np.empty(shape, dtype=np.int64))
        rows, places, whole = self._hasher.rows, list(layers), np.ascontiguousarray
        try:
            wrong = rows(ids_BT, start_BT, past_ids_BJ, past_start_BJ, past_stop_BJ, places, local, out)
        except TypeError:  # some of them lie with gaps
            start = None if start_BT is None else whole(start_BT)
            past = whole(past_ids_BJ), whole(past_start_BJ), whole(past_stop_BJ)
            wrong = rows(whole(ids_BT), start, *past, places, local, out)
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


def split_rows(records_B4: NDArray[np.uint64], rows_N: Ints) -> tuple[list[int], Ints, Ints]:
    """Classes, places and ranks of rows; see reference.split_rows."""
    rows_N = np.ascontiguousarray(rows_N, dtype=np.int64)
    places_N, ranks_N = np.empty_like(rows_N), np.empty_like(rows_N)
    counts = _C.split_rows(records_B4, rows_N, places_N, ranks_N)
    if isinstance(counts, int):
        raise row_outside(rows_N, counts, 64 * len(records_B4))
    return counts, places_N, ranks_N


def crc32_pages(pages_PX: Bytes) -> NDArray[np.uint32]:
    """CRC-32 of every page, as zlib computes it: uint8 [P, X] to uint32 [P]."""
    out = np.empty(len(pages_PX), dtype=np.uint32)
    _C.crc32_pages(np.ascontiguousarray(pages_PX), out, False)
    return out


class MemoryGate(reference.MemoryGate):
    """reference.MemoryGate in one pass over contiguous float32 arrays; made for few positions (one thread).

    Sums of the gate are fp64, the rest is fp32: from exact keys and values the results lie within 1e-6 of the largest
    value from the fp64 reference, which is what rounding each product, each tap and the exponential to fp32 costs.
    KernelError for weights of another kind; ValueError or TypeError for other arrays.
    """

    def __init__(self, **weights: Any) -> None:
        super().__init__(**weights)
        if self.kind not in KINDS:
            raise KernelError(f"gate kind {self.kind!r} is not known", hint="use one of: " + ", ".join(KINDS))
        branches, width = self.query_norm_MD.shape
        wide, memory, conv = branches * width, self.key_weight_YE.shape[-1], self.conv
        wanted: list[tuple[str, Singles | None, tuple[int, ...]]] = [
            ("key weight", self.key_weight_YE, (wide, memory)), ("key bias", self.key_bias_Y, (wide,)),
            ("value weight", self.value_weight_DE, (width, memory)), ("value bias", self.value_bias_D, (width,)),
            ("query norm", self.query_norm_MD, (branches, width)), ("key norm", self.key_norm_MD, (branches, width)),
        ]  # fmt: skip
        if conv is not None:
            wanted += [("conv norm", conv.norm_MD, (branches, width)),
                       ("conv weight", conv.weight_XW, (wide, conv.weight_XW.shape[-1]))]  # fmt: skip
        for name, array, shape in wanted:
            if array is not None and not (name in ("key weight", "value weight") and array.dtype == np.float16):
                _check_singles(name, array, shape)
        self.prepared = _C.MemoryGate(
            self.key_weight_YE, self.key_bias_Y, self.value_weight_DE, self.value_bias_D, self.query_norm_MD,
            self.key_norm_MD, self.eps, KINDS[self.kind], None if conv is None else conv.norm_MD,
            None if conv is None else conv.weight_XW, 1 if conv is None else conv.dilation,
            0.0 if conv is None else conv.eps,
        )  # fmt: skip

    def step(
        self,
        hidden_BTMD: Singles,
        memory_BTE: Singles,
        past_BPX: Singles | None = None,
        mask_BT: Flags | None = None,
        *,
        out_BTMD: Singles | None = None,
    ) -> tuple[Singles, Singles | None]:
        """As the reference says."""
        out = np.empty_like(hidden_BTMD) if out_BTMD is None else out_BTMD
        if self.conv is None:
            self.prepared.step(hidden_BTMD, memory_BTE, None, mask_BT, out, None)
            return out, None
        batch, length, branches, width = hidden_BTMD.shape
        inputs = np.empty((batch, length, branches * width), dtype=np.float32)
        if past_BPX is not None:
            _check_singles("past", past_BPX, (batch, past_BPX.shape[1], branches * width))
        self.prepared.step(hidden_BTMD, memory_BTE, past_BPX, mask_BT, out, inputs)
        return out, inputs


def _check_singles(name: str, array: Singles, shape: tuple[int, ...]) -> None:
    if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
        raise KernelError(f"{name} must be contiguous float32 {list(shape)}, found {array.dtype} {list(array.shape)}")
