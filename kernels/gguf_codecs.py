"""Row codecs that are GGUF's block types byte for byte, so that the tables of a GGUF file are read in place.

A row is D/32 blocks, each with its fp16 scale in front. D must be a multiple of 32.

Shape letters: N rows, D width, K bytes a row, G blocks a row.
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
    Halves,
    checked_bytes,
    checked_out,
    checked_width,
    finite_rows,
    grouped,
    half_scales,
    nearest,
    pack_nibbles,
    put_products,
    reciprocal,
    unpack_nibbles,
    unshrunk_halves,
)
from engram.kernels.group_codecs import int8_numbers

# The 16 steps of IQ4_NL, as ggml's table `kvalues_iq4nl` has them.
IQ4_NL_BOOK = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


@dataclass(frozen=True)
class Q8_0:
    """Blocks of an fp16 scale and 32 signed bytes: value = byte * scale. The numbers are those of `int8`."""

    name: str = "q8_0"
    version: int = 1
    code: int = 6
    group: int | None = GROUP
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return _blocks(self.name, width) * (2 + GROUP)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        self.row_bytes(rows.shape[1])
        steps, scale = int8_numbers(rows)
        return _joined(half_scales(self.name, scale, table, first_row), steps.astype(np.int8).view(np.uint8))

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        scale, body = _parted(raw, width)
        return put_products(body.view(np.int8), scale, out)


@dataclass(frozen=True)
class Q4_0:
    """Blocks of an fp16 scale and 16 bytes of two codes: value = (code - 8) * scale.

    Byte j holds value j of the block in its low half and value j + 16 in its high half. With m the value of largest
    magnitude (the first of equals), scale = m / -8; code = x * (1 / scale) + 8.5 without its fraction, at most 15.
    """

    name: str = "q4_0"
    version: int = 1
    code: int = 7
    group: int | None = GROUP
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return _blocks(self.name, width) * (2 + GROUP // 2)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        self.row_bytes(rows.shape[1])
        quotient, scale = _over_largest(rows, -8)
        codes = np.minimum(np.trunc(quotient + np.float32(8.5)), 15).astype(np.uint8)
        return _joined(half_scales(self.name, scale, table, first_row), pack_nibbles(codes))

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        scale, body = _parted(raw, width)
        return put_products(unpack_nibbles(body).view(np.int8) - np.int8(8), scale, out)


@dataclass(frozen=True)
class Iq4Nl:
    """Blocks as Q4_0's, with a book: value = book[code] * scale.

    Writing: plain = m / -127 with m as in Q4_0, code = the nearest of the book to x * (1 / plain), the lower of two as
    near; scale = the unshrunk one. ggml searches for the scale of least error instead.
    """

    name: str = "iq4_nl"
    version: int = 1
    code: int = 8
    group: int | None = GROUP
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return _blocks(self.name, width) * (2 + GROUP // 2)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        self.row_bytes(rows.shape[1])
        quotient, scale = _over_largest(rows, -127)
        codes = nearest(IQ4_NL_BOOK, quotient)
        plain = half_scales(self.name, scale, table, first_row)
        stored = unshrunk_halves(grouped(rows), grouped(IQ4_NL_BOOK[codes]), plain)
        return _joined(stored, pack_nibbles(codes))

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        scale, body = _parted(raw, width)
        return put_products(IQ4_NL_BOOK[unpack_nibbles(body)], scale, out)


def _blocks(name: str, width: int) -> int:
    if checked_width(width) % GROUP:
        raise CodecError(
            f"codec {name!r} stores blocks of {GROUP} values, so the row width {width} must be a multiple of {GROUP}",
            hint="use int8 or nf4, or a layout with another head_dim",
        )
    return width // GROUP


def _over_largest(rows_ND: Floats, step: int) -> tuple[Floats, Floats]:
    """x * (1 / scale) [N, D] and scale [N, G], where the value of largest magnitude in each block meets `step`."""
    blocks = grouped(rows_ND)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)
    scale = largest / np.float32(step)
    return (blocks * reciprocal(scale)).reshape(rows_ND.shape), scale[:, :, 0]


def _joined(scale_NG: Halves, body_NB: Bytes) -> Bytes:
    """Each block's scale in front of its bytes: [N, K]."""
    count, blocks = scale_NG.shape
    body_NGB = body_NB.reshape(count, blocks, body_NB.shape[1] // blocks)
    rows_NGB = np.concatenate([scale_NG.view(np.uint8).reshape(count, blocks, 2), body_NGB], axis=2)
    return rows_NGB.reshape(count, blocks * rows_NGB.shape[2])


def _parted(raw_NK: Bytes, width: int) -> tuple[Floats, Bytes]:
    """Scales [N, G] as fp32, and the blocks' bytes side by side."""
    count, blocks = len(raw_NK), width // GROUP
    parts = raw_NK.reshape(count, blocks, raw_NK.shape[1] // blocks)
    scale = np.ascontiguousarray(parts[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
    return scale, np.ascontiguousarray(parts[:, :, 2:]).reshape(count, blocks * (parts.shape[2] - 2))
