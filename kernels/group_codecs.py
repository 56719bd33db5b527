"""Row codecs with one scale for every 32 values: int8 (the default), nf4 (the small one), fp8-e8m0 (DeepSeek-V4.1's).

A row is its values, then its scales. The last group may be shorter.

Shape letters: N rows, D width, K bytes a row, G groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram.kernels.codec_base import (
    GROUP,
    NAN,
    Bytes,
    CodecError,
    Decoded,
    Floats,
    checked_bytes,
    checked_out,
    checked_width,
    finite_rows,
    grouped,
    groups,
    half_scales,
    nearest,
    pack_nibbles,
    put_products,
    reciprocal,
    ungrouped,
    unpack_nibbles,
)

# Quantiles of a normal distribution with an exact zero, scaled to -1..1: "QLoRA", arXiv 2305.14314, appendix E.
NF4_BOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip

_E4M3_LEAST_EXPONENT = -6  # of a normal number; smaller ones are steps of 2^-9
_E8M0_BIAS = 127


def int8_numbers(rows_ND: Floats) -> tuple[Floats, Floats]:
    """Steps [N, D] and fp32 scales [N, G] of `int8` and of ggml's Q8_0, which are the same numbers.

    scale = max|x| / 127; step = x * (1 / scale), rounded half away from zero.
    """
    blocks = grouped(rows_ND)
    scale = np.abs(blocks).max(axis=2) / np.float32(127)
    quotient = blocks * reciprocal(scale)[:, :, None]
    magnitude = np.abs(quotient)
    whole = np.floor(magnitude)
    steps = np.copysign(whole + (magnitude - whole >= 0.5), quotient)
    return ungrouped(steps, rows_ND.shape[1]), scale


@dataclass(frozen=True)
class Int8:
    """D signed bytes, then one fp16 scale a group: value = byte * scale. ggml's Q8_0, re-ordered."""

    name: str = "int8"
    version: int = 1
    code: int = 3
    group: int | None = GROUP

    def row_bytes(self, width: int) -> int:
        return checked_width(width) + 2 * groups(width)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        steps, scale = int8_numbers(finite_rows(rows_ND, table, first_row))
        stored = half_scales(self.name, scale, table, first_row)
        return np.concatenate([steps.astype(np.int8).view(np.uint8), stored.view(np.uint8)], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        scale = np.ascontiguousarray(raw[:, width:]).view("<f2").astype(np.float32)
        return put_products(raw[:, :width].view(np.int8), scale, out)


@dataclass(frozen=True)
class Nf4:
    """D/2 bytes of two codes, then one fp16 scale a group: value = book[code] * scale. D must be even.

    A group of n values has n/2 bytes: its first n/2 values in the low halves, the others in the high halves.
    scale = max|x|, as fp16; code = the nearest of the book to x / scale (fp32), the lower of two as near.
    """

    name: str = "nf4"
    version: int = 1
    code: int = 4
    group: int | None = GROUP

    def row_bytes(self, width: int) -> int:
        if checked_width(width) % 2:
            raise CodecError(
                f"codec 'nf4' stores two values in a byte, so the row width {width} must be even",
                hint="use int8, or a layout with an even head_dim",
            )
        return width // 2 + 2 * groups(width)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        width = rows.shape[1]
        self.row_bytes(width)
        blocks = grouped(rows)
        stored = half_scales(self.name, np.abs(blocks).max(axis=2), table, first_row)
        scale = stored.astype(np.float32)[:, :, None]
        quotient = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)
        codes = ungrouped(nearest(NF4_BOOK, quotient), width)
        return np.concatenate([pack_nibbles(codes), stored.view(np.uint8)], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        scale = np.ascontiguousarray(raw[:, width // 2 :]).view("<f2").astype(np.float32)
        return put_products(NF4_BOOK[unpack_nibbles(raw[:, : width // 2])], scale, out)


@dataclass(frozen=True)
class Fp8E8m0:
    """D fp8 numbers (e4m3fn), then one power of two a group (e8m0): value = number * 2^(byte - 127).

    Byte 0 means 2^-127, byte 255 is NaN. Writing takes the smallest power with max|x| / scale <= 448 and rounds to
    nearest, ties to even.
    """

    name: str = "fp8-e8m0"
    version: int = 1
    code: int = 5
    group: int | None = GROUP

    def row_bytes(self, width: int) -> int:
        return checked_width(width) + groups(width)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        blocks = grouped(rows)
        largest = np.abs(blocks).max(axis=2)
        mantissa, exponent = np.frexp(largest)  # largest = mantissa * 2^exponent; 448 = 0.875 * 2^9
        power = np.maximum(np.where(mantissa <= 0.875, exponent - 9, exponent - 8), -_E8M0_BIAS)
        power[largest == 0] = -_E8M0_BIAS
        scaled = np.ldexp(blocks.astype(np.float64), -power[:, :, None])  # exact
        np.clip(scaled, -240, 240, out=scaled, where=power[:, :, None] == 120)  # 256 * 2^120 would be infinite
        codes = ungrouped(_to_e4m3(scaled), rows.shape[1])
        return np.concatenate([codes, (power + _E8M0_BIAS).astype(np.uint8)], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        return put_products(E4M3[raw[:, :width]], _E8M0[raw[:, width:]], out)


def _e4m3_values() -> Floats:
    """What the 256 codes mean: sign, 4 bits of exponent (bias 7), 3 bits of fraction; 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, fraction = (codes >> 3) & 15, codes & 7
    steps = np.where(exponent > 0, 8 + fraction, fraction)
    values: Floats = np.ldexp(steps.astype(np.float32), np.maximum(exponent, 1) - 10)
    values = np.where(codes & 128, -values, values)
    values[[0x7F, 0xFF]] = NAN
    return values


def _to_e4m3(values: NDArray[np.float64]) -> Bytes:
    """Codes of values within -448..448: to nearest, ties to even; the sign of a zero stays."""
    magnitude = np.abs(values)
    normal = magnitude >= 2.0**_E4M3_LEAST_EXPONENT
    exponent = np.where(normal, np.frexp(magnitude)[1] - 1, _E4M3_LEAST_EXPONENT)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int64)  # 8..16 of a normal number, 0..8 below
    codes = ((exponent + 7) << 3) + steps - 8  # 16 steps carry into the exponent
    signed: Bytes = (codes | (np.signbit(values).astype(np.int64) << 7)).astype(np.uint8)
    return signed


E4M3 = _e4m3_values()
_E8M0 = np.append(np.ldexp(np.float64(1), np.arange(255) - _E8M0_BIAS), np.nan).astype(np.float32)
