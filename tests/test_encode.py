"""Encoders of every path against the NumPy codecs: the bytes, the errors and what was lost."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from widths import fitting

from engram.kernels import dispatch
from engram.kernels.codecs import CODECS, Bytes, CodecError, Floats
from engram.kernels.group_codecs import NF4_BOOK, Int8
from engram.kernels.reference import KernelError, _square_sums

CPP = [name for name in dispatch.available() if name != "reference"]
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
IN_CPP = ("f32", "bf16", "int8-row", "int8", "nf4", "fp8-e8m0", "q8_0", "q4_0", "iq4_nl", "h4", "h3", "h2", "h1")
SOURCE = Path(__file__).parents[1] / "kernels" / "csrc" / "isa" / "encode.cpp"
WIDTHS = (1, 2, 31, 33, 62, 160, 256, 1022)


@lru_cache(maxsize=1)  # the paths of a case follow one another
def cases(codec: str, width: int) -> tuple[Floats, Bytes]:
    """Odd rows without those whose scales do not fit the codec, and their bytes."""
    rows = odd_rows(width)
    good = np.sort(fitting_rows(codec, rows, np.arange(len(rows))))
    assert len(good) > 200
    return rows[good], CODECS[codec].encode(rows[good])


def fitting_rows(codec: str, rows: Floats, wanted: NDArray[np.intp]) -> NDArray[np.intp]:
    """Those of the wanted rows that the codec can hold, found by halving."""
    try:
        CODECS[codec].encode(rows[wanted])
    except CodecError:
        half = len(wanted) // 2
        parts = [fitting_rows(codec, rows, part) for part in (wanted[:half], wanted[half:])] if half else [wanted[:0]]
        return np.concatenate(parts)
    return wanted


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
    rows += [on_the_edge(width, lead) for lead in (127, -8, 1, -127, 448, 240)]
    return np.ascontiguousarray(np.concatenate([*rows, special]), dtype=np.float32)


def on_the_edge(width: int, lead: float) -> Floats:
    """Rows whose groups begin with `lead`, which makes some codec's scale 1, then values where rounding turns:

    halves, sixteenths, middles of the books, and the numbers next to them.
    """
    book = (NF4_BOOK[1:].astype(np.float64) + NF4_BOOK[:-1]) / 2
    middles = np.concatenate([np.arange(-254, 255) / 2, np.arange(-16, 17) / 16, np.arange(-32, 33) / 2**10, book])
    near = middles.astype(np.float32)
    up, down = np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))
    values = np.concatenate([near, up, down])
    values = values[np.abs(values) <= abs(lead)]
    rows = np.resize(values, (max(16, -(-2 * len(values) // width)), width))
    rows[:, ::32] = lead
    return rows


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", CPP)
def test_every_encoder_gives_the_bytes_of_numpy(path: str, codec: str, width: int) -> None:
    rows, expected = cases(codec, fitting(codec, width))
    with dispatch.force(path):
        found = dispatch.ops().encode(CODECS[codec], rows)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("path", dispatch.available())
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_threads_slices_and_rows_that_lie_apart(path: str, codec: str) -> None:
    """More rows than one thread takes, of a wider array, backwards, transposed and none: the same bytes."""
    width = fitting(codec, 64)
    wide = np.random.default_rng(5).standard_normal((3001, width + 9)).astype(np.float32)
    views = {"apart": wide[:, 3 : 3 + width], "backwards": wide[::-1, :width], "values apart": wide[:width].T[:width],
             "one": wide[:1, :width], "none": wide[:0, :width]}  # fmt: skip
    with dispatch.force(path):
        for name, rows in views.items():
            expected = CODECS[codec].encode(rows)
            for threads in (1, 3, 0):
                found = dispatch.ops().encode(CODECS[codec], rows, threads=threads)
                np.testing.assert_array_equal(found, expected, err_msg=name)


@dataclass(frozen=True)
class Foreign(Int8):
    """A codec that C++ does not know."""

    code: int = 1000


@pytest.mark.parametrize("path", dispatch.available())
def test_a_codec_without_cpp_goes_to_numpy_in_slices(path: str) -> None:
    rows = np.random.default_rng(6).standard_normal((2000, 40)).astype(np.float32)
    with dispatch.force(path):
        encoded = dispatch.ops().encode(Foreign(), rows, threads=3)
        np.testing.assert_array_equal(encoded, Int8().encode(rows))
        lost, whole = dispatch.ops().row_errors(Foreign(), encoded, rows, threads=3)
        expected = dispatch.ops().row_errors(Int8(), encoded, rows)
        assert np.array_equal(lost, expected[0]) and np.array_equal(whole, expected[1])
        rows[1500, 3] = np.nan
        rows[100] = 1e30  # its scale does not fit, but a NaN anywhere comes first
        with pytest.raises(CodecError, match="part: row 1507, column 3 is nan"):
            dispatch.ops().encode(Foreign(), rows, table="part", first_row=7, threads=3)


def refusals() -> dict[str, tuple[str, Floats]]:
    """What an encoder refuses: codec and rows."""
    good = np.ones((5000, 64), dtype=np.float32)

    def changed(value: float, row: int = 4321, column: int = 63) -> Floats:
        rows = good.copy()
        rows[row, column] = value
        return rows

    cases = {f"{value} in {codec}": (codec, changed(value)) for codec in CODECS for value in (np.nan, np.inf, -np.inf)}
    cases |= {f"a scale of {codec}": (codec, changed(1e30)) for codec in IN_CPP[3:] if codec != "fp8-e8m0"}
    cases |= {f"a scale of {codec} just too large": (codec, changed(65520 * step, 5, 40))
              for codec, step in (("int8", 127), ("nf4", 1), ("q4_0", 8), ("iq4_nl", 127))}  # fmt: skip
    cases["both in one row"] = "nf4", changed(1e30)
    cases["both in one row"][1][4321, 2] = np.nan
    cases["float64"] = "int8", good.astype(np.float64)
    cases["one axis"] = "int8", good[0]
    cases["no values"] = "int8", good[:, :0]
    cases["odd width"] = "nf4", good[:, :63]
    cases["odd width and NaN"] = "nf4", changed(np.nan, 3, 3)[:, :63]
    cases["half a block"] = "q4_0", good[:, :48]
    return cases


REFUSALS = refusals()


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("case", REFUSALS)
def test_errors_have_the_words_of_numpy(path: str, case: str) -> None:
    codec, rows = REFUSALS[case]
    with pytest.raises(CodecError) as expected:
        CODECS[codec].encode(rows, table="layer 7", first_row=1000)
    with dispatch.force(path), pytest.raises(CodecError) as found:
        dispatch.ops().encode(CODECS[codec], rows, table="layer 7", first_row=1000, threads=2)
    assert (str(found.value), found.value.hint) == (str(expected.value), expected.value.hint)


@pytest.mark.parametrize("path", dispatch.available())
@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("width", [1, 15, 64, 256, 300])
def test_errors_of_rows(path: str, codec: str, width: int) -> None:
    """Against sums of exact fractions, and the same bits on every path."""
    width = fitting(codec, width)
    rows = np.random.default_rng(8).standard_normal((700, width)).astype(np.float32)
    rows[3] = 0
    encoded = CODECS[codec].encode(rows)
    back = CODECS[codec].decode(encoded, width)
    with dispatch.force("reference"):
        expected = dispatch.ops().row_errors(CODECS[codec], encoded, rows)
    with dispatch.force(path):
        for threads in (1, 2):
            lost, whole = dispatch.ops().row_errors(CODECS[codec], encoded, rows, threads=threads)
            assert lost.dtype == whole.dtype == np.float64
            assert np.array_equal(lost, expected[0]) and np.array_equal(whole, expected[1])
    for row in (0, 3, 699):
        exact = [sum(Fraction(float(x)) ** 2 for x in values) for values in (back[row] - rows[row], rows[row])]
        assert (float(lost[row]), float(whole[row])) == pytest.approx(tuple(map(float, exact)), rel=1e-14)
    assert lost[3] == whole[3] == 0


@pytest.mark.parametrize("path", dispatch.available())
def test_row_errors_refuse_other_arrays(path: str) -> None:
    rows = np.ones((4, 32), dtype=np.float32)
    encoded = CODECS["int8"].encode(rows)
    with dispatch.force(path):
        with pytest.raises(KernelError, match=r"takes float32 \[4, D\] beside .* found float32 \[3, 32\]"):
            dispatch.ops().row_errors(CODECS["int8"], encoded, rows[:3])
        with pytest.raises(KernelError, match="found float64"):
            dispatch.ops().row_errors(CODECS["int8"], encoded, rows.astype(np.float64))
        with pytest.raises(CodecError, match=r"decodes uint8 \[N, 34\]"):
            dispatch.ops().row_errors(CODECS["int8"], encoded[:, :-1], rows)


def test_rows_wider_than_a_table_holds() -> None:
    """C++ decoders keep a row of at most 4096 values; wider ones go to NumPy."""
    rows = np.random.default_rng(9).standard_normal((3, 8192)).astype(np.float32)
    for codec in CODECS.values():
        if codec.name in ("h4", "h3", "h2", "h1"):  # they refuse such rows
            continue
        encoded = dispatch.ops().encode(codec, rows)
        assert np.array_equal(encoded, codec.encode(rows))
        found = dispatch.ops().row_errors(codec, encoded, rows)
        with dispatch.force("reference"):
            expected = dispatch.ops().row_errors(codec, encoded, rows)
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
        with dispatch.force("reference"):
            assert [len(sums) for sums in dispatch.ops().row_errors(codec, encoded[:0], rows[:0])] == [0, 0]


def test_the_middles_of_the_nf4_book() -> None:
    """The numbers in the C++ source are the exact middles, rounded down to fp32."""
    text = SOURCE.read_text("utf-8")
    found = re.search(r"NF4_MIDDLES\[15\] = \{([^}]*)\}", text)
    assert found is not None
    numbers = [np.float32(word.strip().removesuffix("f")) for word in found[1].split(",")]
    for number, below, above in zip(numbers, NF4_BOOK[:-1], NF4_BOOK[1:], strict=True):
        middle = (Fraction(float(below)) + Fraction(float(above))) / 2
        assert Fraction(float(number)) <= middle < Fraction(float(np.nextafter(number, np.float32(2))))


@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user (Debian's names)")
def test_arm_encoders_give_the_bytes_of_numpy(tmp_path: Path) -> None:
    """Cross-compiled and run under emulation, sums of errors too."""
    assert COMPILER and EMULATOR
    flags = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-static", "-DENGRAM_ISA=neon"]
    others = SOURCE.with_name("encode_hadamard.cpp"), Path(__file__).parent / "arm64_encode.cpp"
    sources = [str(SOURCE), *map(str, others)]
    program = str(tmp_path / "encode")
    subprocess.run([COMPILER, *flags, f"-I{SOURCE.parents[1]}", *sources, "-o", program], check=True)
    question, expected = b"", b""
    for codec in map(CODECS.__getitem__, IN_CPP):
        for width in (fitting(codec.name, 31), fitting(codec.name, 256)):
            rows, encoded = cases(codec.name, width)
            question += struct.pack("<4i", codec.code, width, len(rows), encoded.shape[1]) + rows.tobytes()
            with np.errstate(over="ignore"):
                lost, whole = _square_sums(rows[1:] - rows[:-1]), _square_sums(rows[:-1])
            expected += encoded.tobytes() + lost.tobytes() + whole.tobytes()
    done = subprocess.run([EMULATOR, program], input=question, capture_output=True, check=True)
    assert len(done.stdout) == len(expected)
    assert done.stdout == expected
