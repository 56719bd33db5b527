"""What all row codecs share: the error, the checks of what comes in, the forms of what goes out, groups of 32.

Import codecs, and the names of this file that callers need, from kernels/codecs.py.

Shape letters: N rows, D width (values a row), K bytes a row, G groups a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Decoded = NDArray[Any]  # float32, or uint16 that holds the bits of bf16

GROUP = 32
_PARTIAL_SUMS = 8  # of fp64, by column modulo 8
NAN = np.frombuffer(b"\x00\x00\xc0\x7f", dtype="<f4")[0]  # what a value decodes to that has no finite scale


class CodecError(EngramError):
    """A codec that is not known, or values that a codec cannot hold."""


def checked_width(width: int) -> int:
    """The width, after refusing one below 1."""
    if width < 1:
        raise CodecError(f"row width {width} must be at least 1")
    return width


def groups(width: int) -> int:
    """G: the last group may hold fewer than 32 values."""
    return -(-checked_width(width) // GROUP)


def finite_rows(rows_ND: Floats, table: str, first_row: int) -> Floats:
    """The rows as contiguous float32, after refusing other shapes, other types, NaN and infinity."""
    if rows_ND.ndim != 2 or rows_ND.dtype != np.float32:
        raise CodecError(f"{table}: rows must be float32 [N, D], found {rows_ND.dtype} {list(rows_ND.shape)}")
    checked_width(rows_ND.shape[1])
    good = np.isfinite(rows_ND)
    if not good.all():
        row, column = (int(i) for i in np.argwhere(~good)[0])
        raise CodecError(
            f"{table}: row {first_row + row}, column {column} is {rows_ND[row, column]}; tables hold finite numbers",
            hint="the checkpoint is damaged or its training diverged; go back to an earlier checkpoint",
        )
    return np.ascontiguousarray(rows_ND)


def checked_bytes(name: str, bytes_NK: Bytes, expected: int, width: int) -> Bytes:
    """The bytes, contiguous, after refusing another type or another K than `expected`."""
    if bytes_NK.ndim != 2 or bytes_NK.dtype != np.uint8 or bytes_NK.shape[1] != expected:
        raise CodecError(
            f"codec {name!r} decodes uint8 [N, {expected}] for width {width}, "
            f"found {bytes_NK.dtype} {list(bytes_NK.shape)}"
        )
    return np.ascontiguousarray(bytes_NK)


def checked_out(rows: int, width: int, out: Decoded | None) -> Decoded:
    """Where the values go: `out` itself, or new float32 [N, D]."""
    if out is None:
        return np.empty((rows, width), dtype=np.float32)
    if out.shape != (rows, width) or out.dtype not in (np.float32, np.uint16) or not out.flags.c_contiguous:
        raise CodecError(
            f"out must be contiguous float32 or uint16 (bf16 bits) {[rows, width]}, found {out.dtype} {list(out.shape)}"
        )
    return out


def put_bits(bits_ND: NDArray[np.uint32], out: Decoded) -> Decoded:
    """Write values, given as the bits of fp32, into `out`: as they are, or rounded to nearest even as bf16.

    A NaN keeps its upper half and becomes quiet; a finite value past the largest bf16 becomes infinite.
    """
    if out.dtype == np.float32:
        out.view(np.uint32)[...] = bits_ND
        return out
    nan = (bits_ND & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits_ND.astype(np.uint64) + 0x7FFF + ((bits_ND >> 16) & 1)) >> 16
    out[...] = np.where(nan, (bits_ND >> 16) | 0x0040, rounded)
    return out


def put_products(factors_ND: NDArray[Any], scale_NG: Floats, out: Decoded) -> Decoded:
    """Write factor * scale, one fp32 multiplication a value; G is 1 or the number of groups.

    A group whose scale is NaN or infinite, and a factor that is NaN, give the quiet NaN 0x7FC00000.
    """
    width = factors_ND.shape[1]
    scale_ND = scale_NG if scale_NG.shape[1] == 1 else np.repeat(scale_NG, GROUP, axis=1)[:, :width]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values = factors_ND.astype(np.float32) * scale_ND
    values[~np.isfinite(scale_ND) | np.isnan(factors_ND)] = NAN
    return put_bits(values.view(np.uint32), out)


def grouped(rows_ND: Floats) -> Floats:
    """[N, G, 32], the last group filled up with zeros."""
    count, width = rows_ND.shape
    padded = np.zeros((count, groups(width) * GROUP), dtype=np.float32)
    padded[:, :width] = rows_ND
    return padded.reshape(count, groups(width), GROUP)


def ungrouped(values_NGV: NDArray[Any], width: int) -> NDArray[Any]:
    """[N, G, 32] to [N, D], without what filled up the last group."""
    count, many, each = values_NGV.shape
    return values_NGV.reshape(count, many * each)[:, :width]


def half_scales(name: str, scale_NG: Floats, table: str, first_row: int) -> Halves:
    """The scales as they are stored, fp16; CodecError where one does not fit."""
    with np.errstate(over="ignore", under="ignore"):
        stored = scale_NG.astype("<f2")
    bad = np.isinf(stored)
    if bad.any():
        row, group = (int(i) for i in np.argwhere(bad)[0])
        raise CodecError(
            f"{table}: row {first_row + row} needs the scale {scale_NG[row, group]:g} for its columns from "
            f"{group * GROUP} on; codec {name!r} stores fp16 scales, which end at 65504",
            hint="use int8-row, bf16 or f32",
        )
    return stored


def _halves_of_groups(width: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Columns in the low and in the high half of each byte: of a group of n values the first n/2 and the others."""
    columns = np.arange(width)
    length = np.minimum(GROUP, width - columns // GROUP * GROUP)
    low = columns % GROUP < length // 2
    return columns[low], columns[~low]


def pack_nibbles(codes_ND: Bytes) -> Bytes:
    """Codes 0..15 to [N, D/2], group by group; D is even."""
    low, high = _halves_of_groups(codes_ND.shape[1])
    packed: Bytes = codes_ND[:, low] | codes_ND[:, high] << np.uint8(4)
    return packed


def unpack_nibbles(bytes_NK: Bytes) -> Bytes:
    """[N, D/2] to codes 0..15 [N, D]."""
    low, high = _halves_of_groups(2 * bytes_NK.shape[1])
    codes = np.empty((len(bytes_NK), 2 * bytes_NK.shape[1]), dtype=np.uint8)
    codes[:, low], codes[:, high] = bytes_NK & 15, bytes_NK >> 4
    return codes


def nearest(book: Floats, values: Floats) -> Bytes:
    """Index of the nearest entry of an ascending book; the lower one of two that are as near."""
    middles = (book[:-1].astype(np.float64) + book[1:]) / 2  # exact, so that ties are ties
    return np.searchsorted(middles, values.ravel(), side="left").reshape(values.shape).astype(np.uint8)


def reciprocal(scale_NG: Floats) -> Floats:
    """1 / scale, and 0 where that is no finite number: values so small become zeros."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale_NG
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def ordered_sums(a_ND: Floats, b_ND: Floats) -> Doubles:
    """Sums of a * b over each row: exact fp64 products, eight partial sums by column modulo 8, added in pairs."""
    count, width = a_ND.shape
    products = np.zeros((count, -(-width // _PARTIAL_SUMS), _PARTIAL_SUMS))
    flat = products.reshape(count, products.shape[1] * _PARTIAL_SUMS)  # no -1: there may be no rows
    flat[:, :width] = a_ND.astype(np.float64) * b_ND.astype(np.float64)
    p: Any = np.zeros((count, _PARTIAL_SUMS))
    for column in range(products.shape[1]):  # one after another: numpy's own sum has another order
        p = p + products[:, column]
    while p.shape[1] > 1:
        p = p[:, 0::2] + p[:, 1::2]
    sums: Doubles = p[:, 0]
    return sums


def unshrunk(values_ND: Floats, steps_ND: Floats) -> Doubles:
    """The scale s of a row of steps for which <values, s * steps> = <values, values>; 0 where no scale gives that.

    Rounding to the nearest step, and more so the scale of least squares, make a row a little shorter along itself. That
    is small against its error, but the same for every row, so that a model's loss follows it in first order while the
    rest of the error cancels. With this scale nothing of it is left. Measured: LOG.md, issue 4.
    """
    along_N = ordered_sums(values_ND, steps_ND)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale_N = ordered_sums(values_ND, values_ND) / along_N
    return np.where(along_N != 0, scale_N, 0.0)


def unshrunk_halves(blocks_NGV: Floats, steps_NGV: Floats, plain_NG: Halves) -> Halves:
    """The groups' unshrunk scales as fp16, and the plain ones where those are zero or do not fit."""
    count, many, each = blocks_NGV.shape
    scale_M = unshrunk(blocks_NGV.reshape(count * many, each), steps_NGV.reshape(count * many, each))
    with np.errstate(over="ignore", under="ignore"):
        stored_NG = scale_M.astype(np.float32).astype("<f2").reshape(count, many)
    return np.where(np.isfinite(stored_NG) & (stored_NG != 0), stored_NG, plain_NG)
