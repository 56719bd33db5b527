"""Encoders of every path against the NumPy codecs: the bytes, the errors and what was lost."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from widths import fitting

from engram.kernels import dispatch
from engram.kernels.codecs import CODECS, CodecError, Floats
from engram.kernels.group_codecs import NF4_BOOK
from engram.kernels.reference import KernelError

CPP = [name for name in dispatch.available() if name != "reference"]
SOURCE = Path(__file__).parents[1] / "kernels" / "csrc" / "isa" / "encode.cpp"
WIDTHS = (1, 2, 31, 32, 33, 62, 64, 96, 160, 255, 256, 1022)


def fit_scales(codec: str, rows: Floats) -> Floats:
    """The rows, those left out whose scales do not fit the codec."""
    good = []
    for begin in range(len(rows)):
        try:
            CODECS[codec].encode(rows[begin : begin + 1])
            good.append(begin)
        except CodecError:
            pass
    return rows[good]


def odd_rows(width: int) -> Floats:
    """Rows that meet the corners: zeros of both signs, ties, equals, steps, subnormal and huge numbers, any bits."""
    rng = np.random.default_rng(width)
    plain = rng.standard_normal((64, width)).astype(np.float32)
    rows = [plain * np.float32(scale) for scale in (1, 1e-38, 3e-42, 1e-8, 1e4)]
    rows += [plain * (np.float32(2) ** rng.integers(-149, 16, (64, width))).astype(np.float32)]
    rows += [np.clip(plain, -1, 1) * np.finfo(np.float32).max]
    rows += [rng.integers(-9, 9, (64, width)).astype(np.float32) / np.float32(2)]  # ties and equal magnitudes
    rows += [rng.integers(-255, 256, (64, width)).astype(np.float32)]
    bits = rng.integers(0, 2**32, (256, width), dtype=np.uint32)
    rows += [np.where(np.isfinite(bits.view(np.float32)), bits.view(np.float32), np.float32(-0.0))]
    rows += [(bits & 0xBFFFFFFF).view(np.float32)]  # magnitudes below 2
    special = np.zeros((8, width), dtype=np.float32)
    special[1] = -0.0
    special[2, ::2] = -0.0
    special[3], special[4] = np.finfo(np.float32).max, -np.finfo(np.float32).tiny
    special[5], special[6] = 2.0**-149, 65504
    special[7, 0] = 448 * 2.0**-127
    return np.ascontiguousarray(np.concatenate([*rows, special]), dtype=np.float32)


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("width", WIDTHS)
def test_every_encoder_gives_the_bytes_of_numpy(path: str, codec: str, width: int) -> None:
    width = fitting(codec, width)
    rows = fit_scales(codec, odd_rows(width))
    assert len(rows) > 200
    expected = CODECS[codec].encode(rows)
    with dispatch.force(path):
        found = dispatch.ops().encode(CODECS[codec], rows)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)
