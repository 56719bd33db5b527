"""Hash, scatter-add and checksums in C++ against the reference, on every instruction set: the same bits."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import layout_of

from engram.builders.hash_constants import DIALECTS
from engram.builders.layout import LayoutError
from engram.kernels import dispatch, reference
from engram.kernels.reference import KernelError

PATHS = dispatch.available()
CPP = [path for path in PATHS if path != "reference"]


def _constants(rng: np.random.Generator, smallest: int, largest: int, **changes: Any) -> dict[str, Any]:
    """Constants that no dialect would choose: multipliers over all of int64, moduli of any size."""
    orders, heads, layers = (1, 2, 4), int(rng.integers(1, 12)), 2
    columns = len(orders) * heads
    return dict(
        token_map=rng.permutation(1000), vocab_size=1000, negative_ids=True, orders=orders, heads=heads,
        multipliers=rng.integers(-(2**63), 2**63 - 1, (layers, 4)).tolist(),
        primes=rng.integers(smallest, largest, (layers, columns)).tolist(),
        offsets=rng.integers(0, 2**40, (layers, columns)).tolist(), dead_ids=(3, 7), dead_negative=True, reset_id=11,
        fill=5,
    ) | changes  # fmt: skip


def _question(rng: np.random.Generator, batch: int, length: int, kept: int) -> tuple[Any, ...]:
    return (
        rng.integers(-3, 20, (batch, length)), rng.random((batch, length)) < 0.1,
        rng.integers(-(2**63), 2**63 - 1, (batch, kept)), rng.random((batch, kept)) < 0.2,
        rng.random((batch, kept)) < 0.2,
    )  # fmt: skip


MODULI = [(1, 50), (4095, 4200), (4096, 1 << 20), (1 << 30, 1 << 48), (1 << 58, 1 << 59), (1 << 60, (1 << 63) - 1)]


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("moduli", MODULI)
@pytest.mark.parametrize("oldest_first", [False, True])
def test_hash_equals_the_reference(path: str, moduli: tuple[int, int], oldest_first: bool) -> None:
    """Wrapping products, negative mixes, blocked look-backs, every size of modulus, blocks longer than one."""
    rng = np.random.default_rng(moduli[0])
    for length in (0, 1, 2, 5, 255, 256, 257, 700):
        constants = _constants(rng, *moduli, oldest_first=oldest_first)
        question = _question(rng, 2, length, 3)
        for local in (False, True):
            expected = reference.Hasher(**constants).rows(*question, [1, 0], local)
            with dispatch.force(path):
                got = dispatch.ops().Hasher(**constants).rows(*question, [1, 0], local)
            for a, b in zip(got, expected, strict=True):
                assert a.dtype == np.int64
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", CPP)
@pytest.mark.parametrize("moduli", MODULI)
def test_sums_equal_the_reference(path: str, moduli: tuple[int, int]) -> None:
    """A multiplier for each column and distance, over all of int64: wrapping, negative sums."""
    rng = np.random.default_rng(moduli[0])
    for length in (0, 1, 2, 5, 255, 256, 257, 1100):
        constants = _constants(rng, *moduli, sums=True, oldest_first=length % 2 == 1)
        columns = 3 * constants["heads"]
        own = rng.integers(-(2**63), 2**63 - 1, (2, columns, 4))
        own[:, np.arange(4) >= np.repeat(constants["orders"], constants["heads"])[:, None]] = 0
        constants["multipliers"] = own.reshape(2, -1).tolist()
        question = _question(rng, 2, length, 3)
        for local in (False, True):
            expected = reference.Hasher(**constants).rows(*question, [1, 0], local)
            with dispatch.force(path):
                got = dispatch.ops().Hasher(**constants).rows(*question, [1, 0], local)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", CPP)
def test_the_modulo_is_exact_at_its_edges(path: str) -> None:
    """Mixes next to multiples of the modulus, to both sides, up to the ends of int64."""
    rng = np.random.default_rng(0)
    for prime in (4096, 4099, 65537, 2**31 - 1, (1 << 47) - 115, (1 << 59) - 55, (1 << 62) - 57, (1 << 63) - 25):
        most = (2**63 - 1) // prime
        multiples = np.concatenate([[0, 1, -1, most, -most], rng.integers(-most, most, 500)]) * prime
        values = np.unique(np.concatenate([multiples - 1, multiples, multiples + 1, [2**63 - 1, -(2**63), 1 - 2**63]]))
        constants = _constants(
            rng, 2, 3, token_map=None, vocab_size=2**63 - 1, orders=(1,), heads=1, multipliers=[[1]], primes=[[prime]],
            offsets=[[0]], dead_ids=(), dead_negative=False, reset_id=None,
        )  # fmt: skip
        values = values[values < 2**63 - 1]
        nothing = np.zeros((1, 0), dtype=bool)
        with dispatch.force(path):
            (got,) = dispatch.ops().Hasher(**constants).rows(
                values[None], None, np.zeros((1, 0), dtype=np.int64), nothing, nothing, [0], False
            )
        assert got[0, :, 0].tolist() == [int(v) % prime for v in values.tolist()]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_chunks_hash_like_the_whole(path: str, data: st.DataObject) -> None:
    """Cutting a text anywhere, with the history carried over, changes no row of any dialect."""
    layout = layout_of(data.draw(st.sampled_from(list(DIALECTS))))
    ids = np.array([data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=30))])
    cut = data.draw(st.integers(0, ids.shape[1]))
    with dispatch.force(path):
        whole = layout.rows(ids)
        first = layout.rows(ids[:, :cut])
        rest = layout.rows(ids[:, cut:], layout.history(ids[:, :cut]))
    with dispatch.force("reference"):
        expected = layout.rows(ids)
    for layer in layout.layers:
        np.testing.assert_array_equal(whole[layer], expected[layer])
        np.testing.assert_array_equal(np.concatenate([first[layer], rest[layer]], axis=1), whole[layer])


@pytest.mark.parametrize("dialect", ["qwen-ple", "longcat", "identity"])
@pytest.mark.parametrize("path", PATHS)
def test_an_id_outside_is_an_error(path: str, dialect: str) -> None:
    """The error names the id and the vocabulary; also where the table has rows for more ids."""
    layout = layout_of(dialect)
    with dispatch.force(path):
        for wrong in (40, -1, 2**40):
            with pytest.raises(LayoutError, match=f"token id {wrong} is outside the layout's vocabulary of 40 ids"):
                layout.rows(np.array([[1, wrong, 3]]))


@pytest.mark.parametrize("path", PATHS)
def test_scatter_add_equals_the_sum_in_order(path: str) -> None:
    """Sums in order of appearance, bit for bit; no rows at all is no error."""
    rng = np.random.default_rng(5)
    with dispatch.force(path):
        scatter_add = dispatch.ops().scatter_add
        for count, distinct, width in ((0, 1, 3), (1, 1, 1), (5000, 40, 7), (20_000, 1 << 40, 8), (3000, 3000, 64)):
            rows = rng.integers(0, distinct, count)
            values = (rng.standard_normal((count, width)) * 10.0 ** rng.integers(-6, 6, (count, 1))).astype(np.float32)
            found, sums = scatter_add(rows, values)
            expected: dict[int, Any] = {}
            for row, value in zip(rows.tolist(), values, strict=True):
                expected[row] = expected.get(row, np.zeros(width, dtype=np.float32)) + value
            assert found.tolist() == sorted(expected)
            assert sums.shape == (len(expected), width)
            for row, value in zip(found.tolist(), sums, strict=True):
                assert value.tobytes() == expected[row].tobytes()
    if path != "reference":
        with dispatch.force(path), pytest.raises(KernelError, match="int64"):
            dispatch.ops().scatter_add(np.zeros(3, dtype=np.int32), np.zeros((3, 2), dtype=np.float32))


@pytest.mark.parametrize("path", PATHS)
def test_checksums_are_zlib_s(path: str) -> None:
    """Every length up to several foldings, and real pages."""
    rng = np.random.default_rng(6)
    with dispatch.force(path):
        for length in (*range(0, 200), 255, 256, 257, 1000, 4095, 4096, 4097):
            pages = rng.integers(0, 256, (3, length), dtype=np.uint8)
            assert dispatch.ops().crc32_pages(pages).tolist() == [zlib.crc32(page.tobytes()) for page in pages]


@pytest.mark.skipif(not CPP, reason="no extension in this install")
def test_checksums_by_tables_are_zlib_s() -> None:
    """The portable way, which no processor here would choose."""
    from engram.kernels import _C

    for length in (0, 1, 15, 16, 17, 63, 64, 4096):
        pages = np.random.default_rng(length).integers(0, 256, (2, length), dtype=np.uint8)
        out = np.full(2, 0xFFFFFFFF, dtype=np.uint32)
        _C.crc32_pages(pages, out, True)
        assert out.tolist() == [zlib.crc32(page.tobytes()) for page in pages]
