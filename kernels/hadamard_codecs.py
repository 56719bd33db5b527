"""Row codecs h4 to h1: a rotation makes the values of any row nearly Gaussian, so that one book and one scale serve.

Rotation: column j is multiplied by a fixed sign, then each block of B columns (the largest power of two that divides D)
by the Hadamard matrix of that size. The entries of the books are whole numbers, so the sums of decoding are exact and
their order does not matter: every implementation gives the same bits. Random signs and rotation before a scalar
quantizer: "QuIP#", arXiv 2402.04396; the books are Lloyd-Max quantizers of the normal distribution, brought to whole
numbers.

A row is planes of codes, then one fp16 scale. Shape letters: N rows, D width, K bytes a row, B block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engram.kernels.codec_base import (
    NAN,
    Bytes,
    CodecError,
    Decoded,
    Doubles,
    Floats,
    checked_bytes,
    checked_out,
    checked_width,
    finite_rows,
    nearest,
    ordered_sums,
    put_bits,
    reciprocal,
    unshrunk,
)

WIDEST = 4096  # columns, as in table files

@dataclass(frozen=True)
class Hadamard:
    """value_j = t_j * (sign_j * f): t = the block's Hadamard sums of book[code], f = scale * norm; a fp32 product each.

    `planes` are the bits of a code in each plane, lowest first. A plane of p bits a column takes D * p / 8 bytes; byte
    i has, in its bits k * p and up, column i + k * D * p / 8. `rms` is the book's unit: the scale of encoding makes the
    rotated row's root mean square this number. Which arithmetic makes the code and the scale: FORMAT.md, 2.3.
    """

    name: str
    code: int
    planes: tuple[int, ...]
    book: tuple[int, ...]
    rms: int
    version: int = 1
    group: int | None = None
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        step = 8 // min(self.planes)
        if checked_width(width) % step:
            raise CodecError(
                f"codec {self.name!r} stores {step} values in a byte, so the row width {width} must be a multiple of "
                f"{step}",
                hint="use int8, or a layout with another head_dim",
            )
        if width > WIDEST:
            raise CodecError(
                f"codec {self.name!r} rotates at most {WIDEST} columns, the row width is {width}",
                hint="use int8 or nf4, or a layout with a smaller head_dim",
            )
        return sum(self.planes) * width // 8 + 2

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        width = rows.shape[1]
        self.row_bytes(width)
        book = self.steps
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rotated = butterflies(rows * column_signs(width), block_of(width))
            size = np.sqrt(ordered_sums(rotated, rotated) / width).astype(np.float32)
            to_steps = np.float32(self.rms) * reciprocal(size)
            to_steps[~np.isfinite(to_steps)] = 0
            codes = nearest(book, rotated * to_steps[:, None])
            chosen = book[codes]
            scale = unshrunk(rotated, chosen) * (self.rms / np.sqrt(np.float64(block_of(width))))
            stored = scale.astype(np.float32).astype("<f2")
        self._refuse_large(scale, stored, table, first_row)
        return np.concatenate([*self._packed(codes), stored[:, None].view(np.uint8)], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        steps = self.steps[self._unpacked(raw[:, :-2], width)]
        sums = butterflies(steps, block_of(width))  # whole numbers below 2^24: exact
        scale = np.ascontiguousarray(raw[:, -2:]).view("<f2").astype(np.float32)
        with np.errstate(invalid="ignore"):
            scale *= self.norm(width)
            values = sums * (column_signs(width) * scale)
        values[~np.isfinite(scale[:, 0])] = NAN
        return put_bits(values.view(np.uint32), out)

    @property
    def steps(self) -> Floats:
        """The book as fp32."""
        return np.array(self.book, dtype=np.float32)

    def norm(self, width: int) -> np.float32:
        """1 / (rms * sqrt(B)), rounded once to fp32."""
        return np.float32(1 / (self.rms * np.sqrt(np.float64(block_of(width)))))

    def _packed(self, codes_ND: Bytes) -> list[Bytes]:
        """The planes, [N, D * p / 8] each."""
        planes, done = [], 0
        for bits in self.planes:
            parts = np.split(codes_ND >> np.uint8(done) & np.uint8((1 << bits) - 1), 8 // bits, axis=1)
            plane = np.zeros_like(parts[0])
            for k, part in enumerate(parts):
                plane |= part << np.uint8(k * bits)
            planes.append(plane)
            done += bits
        return planes

    def _unpacked(self, planes_NK: Bytes, width: int) -> Bytes:
        """Codes [N, D]."""
        codes = np.zeros((len(planes_NK), width), dtype=np.uint8)
        begin = done = 0
        for bits in self.planes:
            plane = planes_NK[:, begin : begin + width * bits // 8]
            parts = [plane >> np.uint8(k * bits) & np.uint8((1 << bits) - 1) for k in range(8 // bits)]
            codes |= np.concatenate(parts, axis=1) << np.uint8(done)
            begin, done = begin + plane.shape[1], done + bits
        return codes

    def _refuse_large(self, scale_N: Doubles, stored_N: NDArray[np.float16], table: str, first_row: int) -> None:
        bad = ~np.isfinite(stored_N)
        if bad.any():
            row = int(bad.argmax())
            raise CodecError(
                f"{table}: row {first_row + row} needs the scale {scale_N[row]:g}; codec {self.name!r} stores fp16 "
                "scales, which end at 65504",
                hint="use int8-row, bf16 or f32",
            )


H4 = Hadamard("h4", 9, (4,), (-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104), 38)
H3 = Hadamard("h3", 10, (2, 1), (-88, -55, -31, -10, 10, 31, 55, 88), 41)
H2 = Hadamard("h2", 11, (2,), (-80, -24, 24, 80), 53)
H1 = Hadamard("h1", 15, (1,), (-1, 1), 1)


def block_of(width: int) -> int:
    """The largest power of two that divides the width."""
    return width & -width


@lru_cache(maxsize=64)
def column_signs(width: int) -> Floats:
    """-1 where bit 31 of a mix of the column's number is set, else 1: MurmurHash3's finalizer of j + 1."""
    h = np.arange(1, width + 1, dtype=np.uint32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    signs: Floats = np.where(h >> np.uint32(31), np.float32(-1), np.float32(1))
    signs.setflags(write=False)
    return signs


def butterflies(rows_ND: Floats, block: int) -> Floats:
    """Blocks times the Hadamard matrix, in fp32: for h = 1, 2, 4, … a and b at distance h become a + b and a - b."""
    values = np.ascontiguousarray(rows_ND, dtype=np.float32)
    h = 1
    while h < block:
        pairs = values.reshape(len(values), rows_ND.shape[1] // (2 * h), 2, h)
        a, b = pairs[:, :, :1], pairs[:, :, 1:]
        values = np.concatenate([a + b, a - b], axis=2).reshape(rows_ND.shape)
        h *= 2
    return values
