"""Row codecs with one scale for every 32 values: int8 (the default), nf4 (the small one).

A row is its values, then its scales. The last group may be shorter.

Shape letters: N rows, D width, K bytes a row, G groups a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram.kernels.codec_base import (
    GROUP,
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
    unshrunk_halves,
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
    factor: float = 1.0

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
    code = the nearest of the book to x / max|x| as fp16 (fp32), the lower of two as near; scale = the unshrunk one.
    """

    name: str = "nf4"
    version: int = 1
    code: int = 4
    group: int | None = GROUP
    factor: float = 1.0

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
        codes = nearest(NF4_BOOK, quotient)
        stored = unshrunk_halves(blocks, NF4_BOOK[codes], stored)
        return np.concatenate([pack_nibbles(ungrouped(codes, width)), stored.view(np.uint8)], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        scale = np.ascontiguousarray(raw[:, width // 2 :]).view("<f2").astype(np.float32)
        return put_products(NF4_BOOK[unpack_nibbles(raw[:, : width // 2])], scale, out)
