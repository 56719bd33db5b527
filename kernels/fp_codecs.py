"""Row codecs of 8-bit and 4-bit floats: fp8-e8m0 (DeepSeek-V4.1's), fp8-row, and two that published tables use.

fp8-tensor and nvfp4 have one factor for the whole table. It is no part of a row: it belongs to the codec, and to its
name in files, as 8 hex digits of fp32 bits (`fp8-tensor:3950b4f1`). It multiplies, as ModelOpt's `weight_scale_2` and
the `weight_scale_inv` of fp8 checkpoints do; compressed-tensors' `weight_global_scale` divides: there the factor is 1
over it (one fp32 division).

Shape letters: N rows, D width, K bytes a row, G groups a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

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
    put_products,
    ungrouped,
)

E4M3_MOST = np.float32(448)
E2M1_MOST = np.float32(6)
NVFP4_GROUP = 16
_E4M3_LEAST_EXPONENT = -6  # of a normal number; smaller ones are steps of 2^-9
_E8M0_BIAS = 127
_SCALE_BYTES = 4

# What the 16 codes of e2m1 mean: sign, 2 bits of exponent (bias 1), 1 bit of fraction.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


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
    factor: float = 1.0

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


@dataclass(frozen=True)
class Fp8Row:
    """D fp8 numbers (e4m3fn), then one fp32 scale: value = number * scale.

    scale = max|x| / 448 (one fp32 division; the next smaller number where scale * 448 would overflow); number = the
    e4m3 nearest to x / scale (fp32), ties to even. A row whose scale is zero is all zero bytes.
    """

    name: str = "fp8-row"
    version: int = 1
    code: int = 12
    group: int | None = None
    factor: float = 1.0

    def row_bytes(self, width: int) -> int:
        return checked_width(width) + _SCALE_BYTES

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        scale = _scale_to(np.abs(rows).max(axis=1, keepdims=True), E4M3_MOST)
        return np.concatenate([_e4m3_steps(rows, scale), scale.astype("<f4").view(np.uint8)], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        return put_products(E4M3[raw[:, :width]], np.ascontiguousarray(raw[:, width:]).view("<f4"), out)


@dataclass(frozen=True)
class Fp8Tensor:
    """D fp8 numbers (e4m3fn): value = number * factor, which is the table's.

    Writing: the e4m3 nearest to x / factor (fp32), ties to even, held within -448..448.
    """

    factor: float = 1.0
    version: int = 1
    code: int = 13
    group: int | None = None

    @property
    def name(self) -> str:
        return _with_bits("fp8-tensor", self.factor)

    def row_bytes(self, width: int) -> int:
        return checked_width(width)

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        return _e4m3_steps(finite_rows(rows_ND, table, first_row), np.full((1, 1), self.factor, np.float32))

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        return put_products(E4M3[raw], np.full((len(raw), 1), self.factor, np.float32), out)


@dataclass(frozen=True)
class Nvfp4:
    """D/2 bytes of two e2m1 numbers, then D/16 e4m3 scales: value = (number * scale) * factor, which is the table's.

    Byte i holds column 2 i in its low half and column 2 i + 1 in its high half; D is a multiple of 16. The first
    product is exact. A group whose scale is NaN is the quiet NaN.
    Writing: scale = the e4m3 nearest to max|x| / 6 / factor, held within 448; number = the e2m1 nearest to
    x / (scale * factor), ties to even, the sign of x kept; all zero where scale * factor is 0.
    """

    factor: float = 1.0
    version: int = 1
    code: int = 14
    group: int | None = NVFP4_GROUP

    @property
    def name(self) -> str:
        return _with_bits("nvfp4", self.factor)

    def row_bytes(self, width: int) -> int:
        if checked_width(width) % NVFP4_GROUP:
            raise CodecError(
                f"codec 'nvfp4' stores groups of {NVFP4_GROUP} values, so the row width {width} must be a multiple of "
                f"{NVFP4_GROUP}",
                hint="use int8 or nf4, or a layout with another head_dim",
            )
        return width // 2 + width // NVFP4_GROUP

    def encode(self, rows_ND: Floats, *, table: str = "table", first_row: int = 0) -> Bytes:
        rows = finite_rows(rows_ND, table, first_row)
        count, width = rows.shape
        self.row_bytes(width)
        factor = np.float32(self.factor)
        blocks = rows.reshape(count, width // NVFP4_GROUP, NVFP4_GROUP)
        scales = _e4m3_steps(np.abs(blocks).max(axis=2) / E2M1_MOST, np.full((1, 1), factor))
        with np.errstate(over="ignore", under="ignore"):
            size = (E4M3[scales] * factor)[:, :, None]
            quotient = np.divide(blocks, size, out=np.zeros_like(blocks), where=size != 0)
        codes = _to_e2m1(quotient).reshape(count, width)
        return np.concatenate([codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), scales], axis=1)

    def decode(self, bytes_NK: Bytes, width: int, out: Decoded | None = None) -> Decoded:
        raw = checked_bytes(self.name, bytes_NK, self.row_bytes(width), width)
        out = checked_out(len(raw), width, out)
        pairs = raw[:, : width // 2]
        numbers = E2M1[np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(raw), width)]
        scaled = numbers * np.repeat(E4M3[raw[:, width // 2 :]], NVFP4_GROUP, axis=1)
        return put_products(scaled, np.full((len(raw), 1), self.factor, np.float32), out)


def fitted(codec: Fp8Tensor | Nvfp4, largest: float) -> Fp8Tensor | Nvfp4:
    """The codec with the factor of a table whose largest magnitude is `largest`: that over 448, for nvfp4 over 6 * 448.

    fp32 divisions; 1 for a table of zeros.
    """
    most = E4M3_MOST if isinstance(codec, Fp8Tensor) else E2M1_MOST * E4M3_MOST
    scale = float(_scale_to(np.array([largest], np.float32), most)[0])
    return replace(codec, factor=scale or 1.0)


def with_bits(codec: Fp8Tensor | Nvfp4, bits: str) -> Fp8Tensor | Nvfp4:
    """The codec with the factor that a name in a file has behind its colon; CodecError where that is none."""
    plain = codec.name.partition(":")[0]
    if not re.fullmatch(r"[0-9a-f]{8}", bits):
        raise CodecError(
            f"row codec {plain!r} needs the table's factor in its name, as the 8 lower-case hex digits of its fp32 "
            f"bits, found {plain + ':' + bits if bits else plain!r}",
            hint=f"for example {plain}:3950b4f1",
        )
    factor = float(np.array(int(bits, 16), dtype=np.uint32).view(np.float32))
    if not (np.isfinite(factor) and factor > 0):
        raise CodecError(f"row codec {plain + ':' + bits!r}: the factor {factor:g} must be finite and above 0")
    return replace(codec, factor=factor)


def _with_bits(plain: str, factor: float) -> str:
    return f"{plain}:{int(np.float32(factor).view(np.uint32)):08x}"


def _scale_to(largest: Floats, most: np.float32) -> Floats:
    """largest / most, or the next number towards zero where its product with `most` would be infinite."""
    scale: Floats = largest / most
    with np.errstate(over="ignore"):
        np.nextafter(scale, np.float32(0), out=scale, where=np.isinf(scale * most))
    return scale


def _e4m3_steps(rows_ND: Floats, scale: Floats) -> Bytes:
    """Codes of x / scale, held within -448..448; all 0 where the scale is 0."""
    with np.errstate(over="ignore", under="ignore"):
        quotient = np.divide(rows_ND, scale, out=np.zeros_like(rows_ND), where=scale != 0)
    return _to_e4m3(np.clip(quotient, -E4M3_MOST, E4M3_MOST).astype(np.float64))


def _to_e2m1(values: Floats) -> Bytes:
    """Codes to nearest, ties to even, held within -6..6; the sign of a zero stays."""
    magnitude = np.abs(values)
    codes = np.signbit(values).astype(np.uint8) << np.uint8(3)
    for low in range(7):  # past the middle of two neighbours, or on it where the upper one is the even code
        middle = (E2M1[low] + E2M1[low + 1]) / np.float32(2)
        codes += magnitude >= middle if low % 2 else magnitude > middle
    return codes


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
