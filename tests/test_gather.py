"""Gather + decode in C++ against the readable codecs: every codec, every instruction set, random bytes, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from engram.kernels import dispatch
from engram.kernels.codecs import CODECS, find_codec
from engram.kernels.reference import KernelError

CPP = [path for path in dispatch.available() if path != "reference"]
WIDTHS = (2, 10, 16, 30, 32, 40, 64, 72, 80, 128, 160, 256, 288, 512, 1024)


def _holds(name: str, width: int) -> bool:
    try:
        return CODECS[name].row_bytes(width) > 0
    except Exception:
        return False


CASES = [(name, width) for name in CODECS for width in WIDTHS if _holds(name, width)]


def _random(name: str, width: int, rows: int = 300) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random bytes: every kind of scale and code turns up, NaN and infinity among them."""
    rng = np.random.default_rng(width)
    table = rng.integers(0, 256, (rows, CODECS[name].row_bytes(width)), dtype=np.uint8)
    table[0], table[1], table[2] = 0, 255, 127
    return table


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize(("name", "width"), CASES)
@pytest.mark.parametrize("kind", [np.float32, np.uint16], ids=["f32", "bf16"])
def test_every_codec_equals_the_reference(path: str, name: str, width: int, kind: type) -> None:
    """The bits are those of the reference, whatever the bytes are."""
    table = _random(name, width)
    rows = np.random.default_rng(1).integers(0, len(table), (7, 3, 5))
    rows[0, 0, :3] = [0, 1, 2]
    expected = np.full((7, 3, 5 * width), 0xFF, dtype=np.uint8).astype(kind)
    with dispatch.force("reference"):
        dispatch.ops().gather(CODECS[name], table, rows, expected)
    out = np.full_like(expected, 77)
    with dispatch.force(path):
        assert dispatch.name() == path
        assert dispatch.ops().gather(CODECS[name], table, rows, out) is out
    bits = np.uint32 if kind is np.float32 else np.uint16
    np.testing.assert_array_equal(out.view(bits), expected.view(bits))


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("name", ["fp8-tensor:3950b4f1", "nvfp4:3950b4f1", "nvfp4:7f000000", "fp8-tensor:00000123"])
def test_the_tables_factor_reaches_the_kernels(path: str, name: str) -> None:
    """A factor of the world, one that overflows, a subnormal one."""
    codec, table = find_codec(name), _random(name.partition(":")[0], 80)
    expected, out = np.empty((len(table), 80), np.float32), np.full((len(table), 80), np.nan, np.float32)
    codec.decode(table, 80, expected)
    with dispatch.force(path):
        dispatch.ops().gather(codec, table, np.arange(len(table))[:, None], out)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("name", ["h4", "h3", "h2", "h1"])
@pytest.mark.parametrize("width", [2048, 4096])
def test_the_widest_rows_are_read_whole(path: str, name: str, width: int) -> None:
    """Rotations over more than 256 columns, and rows longer than the place where short ones are staged."""
    codec, table = CODECS[name], _random(name, width, 20)
    out = np.full((20, width), np.nan, np.float32)
    with dispatch.force(path):
        dispatch.ops().gather(codec, table, np.arange(20)[:, None], out)
    np.testing.assert_array_equal(out.view(np.uint32), codec.decode(table, width).view(np.uint32))


@pytest.mark.parametrize("path", CPP)
def test_threads_strided_tables_and_many_rows(path: str) -> None:
    """Rows that lie apart, and more rows than one thread takes, come out the same."""
    codec = CODECS["int8"]
    wide = np.random.default_rng(3).integers(0, 256, (500, 300), dtype=np.uint8)
    table = wide[:, : codec.row_bytes(256)]
    rows = np.random.default_rng(4).integers(0, 500, (20_001, 1))
    expected = codec.decode(np.ascontiguousarray(table), 256)[rows[:, 0]]
    with dispatch.force(path):
        for threads in (1, 2, 0):
            out = np.full((20_001, 256), np.nan, dtype=np.float32)
            dispatch.ops().gather(codec, table, rows, out, threads=threads)
            np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("path", dispatch.available())
@pytest.mark.parametrize("wrong", [-1, 300, 2**62, -(2**63)])
def test_a_row_outside_is_refused_before_anything_is_written(path: str, wrong: int) -> None:
    """The error names the row and the table's size; the output is untouched."""
    table = _random("bf16", 32)
    out = np.full((4, 32), 7, dtype=np.float32)
    with dispatch.force(path), pytest.raises(KernelError, match=rf"row {wrong} is outside .* 300 rows"):
        dispatch.ops().gather(CODECS["bf16"], table, np.array([[5], [6], [wrong], [7]]), out)
    assert (out == 7).all()


@pytest.mark.parametrize("path", dispatch.available())
def test_arrays_of_another_kind_are_refused(path: str) -> None:
    """Wrong types and shapes are errors with a name, never a cast."""
    codec, table = CODECS["f32"], _random("f32", 32)
    rows = np.zeros((2, 1), dtype=np.int64)
    good = np.empty((2, 32), dtype=np.float32)
    with dispatch.force(path):
        gather = dispatch.ops().gather
        for arguments in (
            (table, rows.astype(np.int32), good),
            (table, rows, np.empty((2, 32))),
            (table, rows, np.empty((2, 31), dtype=np.float32)),
            (table, rows, np.empty((2, 64), dtype=np.float32)[:, ::2]),
            (table.astype(np.int8), rows, good),
            (table[:, :-1], rows, good),
            (table, rows, None),
        ):
            with pytest.raises(KernelError):
                gather(codec, *arguments)
        assert gather(codec, table, np.zeros((3, 0), dtype=np.int64), width=32).shape == (3, 0)


def test_a_path_that_cannot_be_had_is_an_error() -> None:
    """An explicit choice that cannot be honoured is never replaced silently."""
    code = "from engram.kernels import dispatch; print(dispatch.name())"

    def chosen(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], env={**__import__("os").environ, "ENGRAM_KERNELS": value},
            capture_output=True, text=True,
        )  # fmt: skip

    assert chosen("reference").stdout.strip() == "reference"
    assert chosen("auto").stdout.strip() == dispatch.available()[0]
    assert "kernels 'fortran' are not known" in chosen("fortran").stderr
    absent = "cpp-neon" if "cpp-neon" not in dispatch.available() else "cpp-avx2"
    assert "cannot be used on this machine" in chosen(absent).stderr


@pytest.mark.skipif(len(CPP) < 2, reason="only one instruction set here")
def test_instruction_sets_are_really_different_code() -> None:
    """Forcing one is seen in the extension itself."""
    from engram.kernels import _C

    for path in CPP:
        with dispatch.force(path):
            assert _C.active_isa() == path.removeprefix("cpp-")
    assert dispatch.name() == dispatch.available()[0]
