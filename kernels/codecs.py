"""Row codecs: how one table row of float32 values becomes bytes and comes back; encode beside decode, numpy only.

A row's values and its scales lie together, so that one read fetches both. All numbers are little-endian. Encoding is
deterministic; decoding is defined for every bit pattern, so that another implementation can be compared bit by bit.
This file: the registry and the plain codecs. Others: group_codecs.py, gguf_codecs.py, hadamard_codecs.py, fp_codecs.py.

Shape letters: N rows, D width (values a row), K bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram.kernels.codec_base import (
    Bytes,
    CodecError,
    Decoded,
    Floats,
    checked_bytes,
    checked_out,
    checked_width,
    finite_rows,
    put_bits,
    put_products,
)
from engram.kernels.fp_codecs import Fp8E8m0, Fp8Row, Fp8Tensor, Nvfp4, fitted, with_bits
from engram.kernels.gguf_codecs import Q4_0, Q8_0, Iq4Nl
from engram.kernels.group_codecs import Int8, Nf4
from engram.kernels.hadamard_codecs import H1, H2, H3, H4

__all__ = [
    "CODECS", "Bytes", "Codec", "CodecError", "Decoded", "Floats", "find_codec", "with_factor", "written_codecs",
]  # fmt: skip

_SCALE_BYTES = 4


class Codec(Protocol):
    """One way to store a row. `name` and `version` are recorded in every file that uses it."""

    @property
    def name(self) -> str:
        """The codec's id in files; with a colon and the factor's bits where the codec has one."""

    @property
    def version(self) -> int:
        """Counts up whenever the bytes of a row would be read otherwise."""

    @property
    def code(self) -> int:
        """The codec's number in the C++ and GPU kernels."""

    @property
    def group(self) -> int | None:
        """Values that share a scale (the last group of a row may be shorter); None where a row has one or none."""

    @property
    def factor(self) -> float:
        """What every value of the table is multiplied by, an fp32 number; 1 where the codec has no such factor."""

    def row_bytes(self, width: int) -> int:
        """Bytes of one row; CodecError for a width that the codec cannot hold."""

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        """float32 [N, D] to uint8 [N, K]; CodecError names `table` and the row where a value is NaN or infinite."""

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        """uint8 [N, K] to float32 [N, D], written into `out` where given.

        `out` may be uint16: it takes the bits of bf16, each rounded to nearest even from the float32 value; a NaN keeps
        its upper half and becomes quiet. CodecError for another K, or another shape or type of `out`.
        """


@dataclass(frozen=True)
class Float32:
    """The values themselves, 4 bytes each: the bits that went in come out."""

    name: str = "f32"
    version: int = 1
    code: int = 0
    group: int | None = None
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return 4 * checked_width(width)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        return rows.astype("<f4", copy=False).view(np.uint8)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        return put_bits(raw.view("<u4"), out)


@dataclass(frozen=True)
class BFloat16:
    """The upper half of each float32, rounded to nearest, ties to even; a value past the largest bf16 saturates."""

    name: str = "bf16"
    version: int = 1
    code: int = 1
    group: int | None = None
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return 2 * checked_width(width)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        bits = finite_rows(rows_ND, table, first_row).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        np.copyto(rounded, (bits >> 16) & 0x8000 | 0x7F7F, where=rounded & 0x7FFF == 0x7F80)
        return rounded.astype("<u2").view(np.uint8)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        return put_bits(np.left_shift(raw.view("<u2"), 16, dtype=np.uint32), out)


@dataclass(frozen=True)
class Int8Row:
    """D signed bytes, then one fp32 scale: value = byte * scale.

    scale = max|x| / 127 (one fp32 division; the next smaller number where scale * 127 would overflow); byte = x / scale
    (fp32), rounded half to even, held within -127..127.
    A row of zeros, or one so small that its scale is zero, is all zero bytes.
    """

    name: str = "int8-row"
    version: int = 1
    code: int = 2
    group: int | None = None
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return checked_width(width) + _SCALE_BYTES

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
        with np.errstate(over="ignore"):
            np.nextafter(scale, np.float32(0), out=scale, where=np.isinf(scale * np.float32(127)))
        out = np.empty((len(rows), rows.shape[1] + _SCALE_BYTES), dtype=np.uint8)
        out[:, : rows.shape[1]] = _steps(rows, scale, -127, 127).view(np.uint8)
        out[:, rows.shape[1] :] = scale.astype("<f4").view(np.uint8)
        return out

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        return put_products(raw[:, :width].view(np.int8), np.ascontiguousarray(raw[:, width:]).view("<f4"), out)


_ALL: tuple[Codec, ...] = (
    Float32(), BFloat16(), Int8Row(), Int8(), Nf4(), Fp8E8m0(), Q8_0(), Q4_0(), Iq4Nl(), H4, H3, H2, H1,
    Fp8Row(), Fp8Tensor(), Nvfp4(),
)  # fmt: skip
CODECS: dict[str, Codec] = {codec.name.partition(":")[0]: codec for codec in _ALL}  # those with a factor: with 1


def find_codec(name: str, version: int | None = None) -> Codec:
    """The codec of that name; CodecError where this release has none, or has another version of it than asked.

    A codec with a factor is found by the whole name that a file has: `fp8-tensor:3950b4f1`.
    """
    plain, colon, bits = name.partition(":")
    codec = CODECS.get(plain)
    if codec is None or colon and not isinstance(codec, (Fp8Tensor, Nvfp4)):
        raise CodecError(f"row codec {name!r} is not known", hint="use one of: " + ", ".join(written_codecs(plain)))
    if isinstance(codec, (Fp8Tensor, Nvfp4)):
        try:
            codec = with_bits(codec, bits)
        except CodecError as wrong:
            own = f"tables of your own are stored as one of: {', '.join(written_codecs(plain))}"
            raise CodecError(str(wrong), hint=f"{wrong.hint}; {own}" if wrong.hint else own) from None
    if version is not None and version != codec.version:
        raise CodecError(
            f"row codec {name!r} has version {version}, this release knows version {codec.version}",
            hint="use the release of engram that wrote it, or quantize again from the float checkpoint",
        )
    return codec


def written_codecs(like: str = "") -> list[str]:
    """The names that a float table can be written in without looking at all of it first, the likest of `like` first.

    A codec with a factor is only for tables that others wrote: its name has the factor of one table.
    """
    names = [name for name, codec in CODECS.items() if not isinstance(codec, (Fp8Tensor, Nvfp4))]
    close = get_close_matches(like.lower(), names, n=len(names), cutoff=0.5)
    return close + [name for name in names if name not in close]


def with_factor(codec: Codec, largest: float) -> Codec:
    """The codec for a table whose largest magnitude is `largest`: with its factor chosen, where it has one."""
    return fitted(codec, largest) if isinstance(codec, (Fp8Tensor, Nvfp4)) else codec


def _steps(rows_ND: Floats, scale_N1: Floats, lowest: int, highest: int) -> NDArray[np.int8]:
    """x / scale, rounded half to even and held within bounds; 0 where the scale is 0."""
    quotient = np.zeros_like(rows_ND)
    np.divide(rows_ND, scale_N1, out=quotient, where=scale_N1 != 0)
    np.rint(quotient, out=quotient)
    return np.clip(quotient, lowest, highest, out=quotient).astype(np.int8)
