"""Rows to classes and ranks: C++ against the reference, and the reference against counting."""

from __future__ import annotations

import numpy as np
import pytest

from engram.kernels import dispatch
from engram.kernels.reference import KernelError

PATHS = dispatch.available()


@pytest.mark.parametrize("path", PATHS)
def test_classes_and_ranks_are_those_of_counting(path: str) -> None:
    """Records built bit by bit in Python integers."""
    rng = np.random.default_rng(0)
    class_N = rng.integers(0, 4, 64 * 9)
    records, before, rank = [], [0, 0, 0, 0], []
    for block in class_N.reshape(9, 64).tolist():
        low, high = (sum((c >> plane & 1) << i for i, c in enumerate(block)) for plane in (0, 1))
        records.append([low, high, before[1] | before[2] << 32, before[3]])
        for c in block:
            rank.append(before[c])
            before[c] += 1
    rows = rng.integers(0, len(class_N), 1000)
    with dispatch.force(path):
        counts, places, ranks = dispatch.ops().split_rows(np.array(records, np.uint64), rows)
    begin = 0
    for number, count in enumerate(counts):
        where = places[begin : begin + count]
        assert where.tolist() == np.flatnonzero(class_N[rows] == number).tolist()
        assert ranks[begin : begin + count].tolist() == [rank[r] for r in rows[where].tolist()]
        begin += count
    assert begin == 1000


@pytest.mark.parametrize("path", [path for path in PATHS if path != "reference"])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 5000])
def test_any_records_give_the_same_bits(path: str, count: int) -> None:
    rng = np.random.default_rng(count)
    records = rng.integers(0, 1 << 64, (300, 4), dtype=np.uint64)
    rows = rng.integers(0, 64 * 300, count)
    with dispatch.force("reference"):
        expected = dispatch.ops().split_rows(records, rows)
    with dispatch.force(path):
        found = dispatch.ops().split_rows(records, rows)
    assert found[0] == expected[0]
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert got.dtype == wanted.dtype == np.int64 and got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", [-1, 128, 1 << 62, -(1 << 63)])
def test_a_row_without_a_record_is_refused(path: str, row: int) -> None:
    records = np.zeros((2, 4), np.uint64)
    with dispatch.force(path):
        with pytest.raises(KernelError, match=f"row {row} is outside the table, which has 128 rows"):
            dispatch.ops().split_rows(records, np.array([5, row, 999]))
        with pytest.raises(KernelError, match="row 0 is outside the table, which has 0 rows"):
            dispatch.ops().split_rows(records[:0], np.array([0]))
