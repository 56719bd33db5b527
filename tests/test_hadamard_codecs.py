"""h4 to h1: against a slow float64 implementation written from FORMAT.md, and the error table measured before."""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.kernels.codecs import CODECS, CodecError, Floats
from engram.kernels.hadamard_codecs import column_signs

NAMES = ("h4", "h3", "h2", "h1")
# Relative error at D = 256 of Gaussian and of heavy-tailed rows, by another implementation (fp32 books, fp64 rotation).
ERRORS = {"h4": (0.0968, 0.0949), "h3": (0.1845, 0.1815), "h2": (0.3411, 0.3354), "h1": (0.6018, 0.5943)}
PLANES = {"h4": (4,), "h3": (2, 1), "h2": (2,), "h1": (1,)}
BOOKS = {"h4": (38, [5, 15, 25, 36, 48, 62, 79, 104]), "h3": (41, [10, 31, 55, 88]), "h2": (53, [24, 80]),
         "h1": (1, [1])}  # fmt: skip


def sign(column: int) -> int:
    mask, h = 0xFFFFFFFF, column + 1
    h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
    return -1 if (h ^ (h >> 16)) >> 31 else 1


@lru_cache
def hadamard(size: int) -> NDArray[np.float64]:
    """Entry (i, j) is 1, or -1 where i & j has an odd number of ones."""
    return np.array([[1 - 2 * ((i & j).bit_count() % 2) for j in range(size)] for i in range(size)], dtype=np.float64)


def codes_by_hand(name: str, row: bytes, width: int) -> list[int]:
    codes, done = [0] * width, 0
    for bits in PLANES[name]:
        size = width * bits // 8
        for column in range(width):
            byte = row[column % size]
            codes[column] |= (byte >> (column // size * bits) & ((1 << bits) - 1)) << done
        row, done = row[size:], done + bits
    return codes


def decoded_by_hand(name: str, row: bytes, width: int) -> NDArray[np.float64]:
    """Exact but for the last product: in fp64."""
    unit, upper = BOOKS[name]
    book = [-b for b in reversed(upper)] + upper
    block = width & -width
    steps = np.array([book[c] for c in codes_by_hand(name, row, width)], dtype=np.float64).reshape(-1, block)
    sums = (steps @ hadamard(block)).ravel()
    scale = struct.unpack("<e", row[-2:])[0]
    signs = np.array([sign(j) for j in range(width)])
    values: NDArray[np.float64] = sums * signs * scale / (unit * np.sqrt(block))
    return values


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [8, 24, 72, 160, 256, 1024])
def test_random_bytes_decode_as_by_hand(name: str, width: int) -> None:
    codec = CODECS[name]
    raw = np.random.default_rng(width).integers(0, 256, (60, codec.row_bytes(width)), dtype=np.uint8)
    out = np.full((60, width), np.nan, dtype=np.float32)
    assert codec.decode(raw, width, out) is out
    for row, values in zip(raw, out, strict=True):
        expected = decoded_by_hand(name, row.tobytes(), width)
        if np.isfinite(expected).all():
            np.testing.assert_allclose(values, expected, rtol=3e-7, atol=0)
        else:
            assert (values.view(np.uint32) == 0x7FC00000).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_that_is_not_finite_damages_its_row_only(name: str) -> None:
    codec = CODECS[name]
    raw = np.zeros((65536, codec.row_bytes(8)), dtype=np.uint8)
    raw[:, -2:] = np.arange(65536, dtype="<u2")[:, None].view(np.uint8)
    out = codec.decode(raw, 8)
    bad = (np.arange(65536) & 0x7C00) == 0x7C00
    assert (out.view(np.uint32)[bad] == 0x7FC00000).all() and np.isfinite(out[~bad]).all()


def test_the_signs_are_the_formulas_and_balanced() -> None:
    assert column_signs(4096).tolist() == [sign(j) for j in range(4096)]
    assert abs(column_signs(4096).sum()) < 200


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [64, 160, 256])
def test_encoding_follows_its_rule(name: str, width: int) -> None:
    """The rule of FORMAT.md in fp64; codes may differ only where a value lies within fp32 rounding of a middle."""
    generator = np.random.default_rng(width)
    rows = (generator.standard_t(3, (50, width)) * np.exp(generator.standard_normal((50, 1)))).astype(np.float32)
    unit, upper = BOOKS[name]
    book = np.array([-b for b in reversed(upper)] + upper, dtype=np.float64)
    block = width & -width
    for row, encoded in zip(rows, CODECS[name].encode(rows), strict=True):
        signed = (row * np.array([sign(j) for j in range(width)])).astype(np.float64).reshape(-1, block)
        rotated = (signed @ hadamard(block)).ravel()
        in_steps = rotated * (unit / np.sqrt((rotated**2).mean()))
        codes = codes_by_hand(name, encoded.tobytes(), width)
        off = np.abs(book[codes] - in_steps) - np.abs(book[:, None] - in_steps).min(axis=0)
        assert off.max() < 1e-3
        steps = book[codes]
        scale = (rotated @ rotated) / (rotated @ steps) * unit / np.sqrt(block)
        assert struct.unpack("<e", encoded[-2:].tobytes())[0] == pytest.approx(scale, rel=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_error_does_not_depend_on_the_distribution(name: str) -> None:
    generator = np.random.default_rng(2)
    gauss = generator.standard_normal((4096, 256))
    heavy = generator.standard_t(3, (4096, 256)) * np.exp(generator.standard_normal((4096, 1)))
    for rows, error in zip((gauss, heavy), ERRORS[name], strict=True):
        values = rows.astype(np.float32)
        back = CODECS[name].decode(CODECS[name].encode(values), 256)
        by_row = np.linalg.norm(back - values, axis=1) / np.linalg.norm(values, axis=1)
        # the table's rows have the scale of least squares, ours keep their length: e / sqrt(1 - e^2)
        assert np.sqrt((by_row**2).mean()) == pytest.approx(error / np.sqrt(1 - error**2), rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_book_is_the_best_for_its_bits(name: str) -> None:
    """Error of the book on a normal distribution, by integration, against Max's quantizers (1960, table I)."""
    best = {"h4": 0.009497, "h3": 0.03454, "h2": 0.1175, "h1": 0.3634}[name]
    unit, upper = BOOKS[name]
    assert CODECS[name].book == tuple([-b for b in reversed(upper)] + upper)  # type: ignore[attr-defined]
    x = np.linspace(0, 12, 2_000_001)
    density = np.exp(-x * x / 2)
    q = np.array(upper)[np.searchsorted((np.array(upper[1:]) + upper[:-1]) / 2, x * unit)] / unit
    error = 1 - (density @ (x * q)) ** 2 / (density @ (q * q)) / (density @ (x * x))
    assert error == pytest.approx(best, rel=2e-3)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(-8, 8))
def test_how_far_off_a_row_comes_back(name: str, eighths: int, seed: int, power: int) -> None:
    """Not much further than zeros are, unless one block holds nearly all: the smallest steps elsewhere add up."""
    rows = (np.random.default_rng(seed).standard_t(2, (3, 8 * eighths)) * 2.0**power).astype(np.float32)
    back = CODECS[name].decode(CODECS[name].encode(rows), 8 * eighths)
    upper = BOOKS[name][1]
    most = max(1.5, upper[0] / upper[-1] * np.sqrt(8 * eighths))
    assert (np.linalg.norm(back - rows, axis=1) <= most * np.linalg.norm(rows, axis=1)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("large", [1e8, 3e38])
def test_a_scale_beyond_fp16_is_refused(name: str, large: float) -> None:
    rows = np.ones((8, 96), dtype=np.float32)
    rows[5] = large
    words = r"layer 3: row 105 needs the scale .* codec 'h.' stores fp16 .*65504"
    with pytest.raises(CodecError, match=words) as refused:
        CODECS[name].encode(rows, table="layer 3", first_row=100)
    assert "int8-row" in (refused.value.hint or "")


@pytest.mark.parametrize(("name", "width", "step"), [("h4", 7, 2), ("h2", 30, 4), ("h3", 36, 8), ("h1", 36, 8)])
def test_widths_that_do_not_fill_bytes_are_refused(name: str, width: int, step: int) -> None:
    rows: Floats = np.zeros((2, width), dtype=np.float32)
    with pytest.raises(CodecError, match=f"row width {width} must be a multiple of {step}"):
        CODECS[name].encode(rows)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_more_columns_than_a_table_may_have_are_refused(name: str) -> None:
    assert CODECS[name].row_bytes(4096) == 4096 * sum(PLANES[name]) // 8 + 2
    with pytest.raises(CodecError, match=f"'{name}' rotates at most 4096 columns, the row width is 4104"):
        CODECS[name].row_bytes(4104)
    kernels = pytest.importorskip("engram.kernels._C")
    widths = [72, 4096, 4104]
    assert [kernels.row_bytes(CODECS[name].code, w) for w in widths] == [*map(CODECS[name].row_bytes, widths[:2]), -1]
