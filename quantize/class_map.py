"""The class map of a mixed table: which of up to four classes each row belongs to, and its place in that class's file.

FORMAT.md section 1.7 specifies its bytes; mixed_file.py writes and reads them, mixed_table.py reads rows through it.
32 bytes say it all for 64 rows: two bits a row, and how many rows of each class came before.

Shape letters: N rows asked for, B blocks of 64 rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram.kernels import dispatch
from engram.kernels.codecs import Bytes
from engram.quantize.page_reader import Ints
from engram.quantize.row_store import RowStoreError

Words = NDArray[np.uint64]

CLASSES = 4
BLOCK = 64  # rows of a record
MOST_ROWS = 1 << 32
_AT_ONCE = 1 << 16  # records that are worked on at a time
_HALF = np.uint64(32)


class Share(NamedTuple):
    """Rows of a request that one class has."""

    number: int  # the class
    places: Ints | None  # where they are in the request; None where they are all of it
    ranks: Ints  # which rows of the class's file they are


class ClassMap:
    """The class and rank of every row: uint64 [B, 4], half a byte a row, as the file has them."""

    def __init__(self, rows: int, records: Words) -> None:
        self.rows, self.records = rows, records
        records.flags.writeable = False
        self.counts = _totals(rows, records)  # rows of each class

    @classmethod
    def build(cls, rows: int, blocks: Iterable[Bytes]) -> ClassMap:
        """From the class (0 to 3) of every row in order, uint8 [n] at a time; takes 0.5 bytes a row and one block.

        Raises RowStoreError for a class above 3, and where the blocks hold other than `rows` rows.
        """
        if not 1 <= rows <= MOST_ROWS:
            raise RowStoreError(f"a mixed table of {rows} rows; it must have 1 to {MOST_ROWS}")
        records = np.zeros((-(-rows // BLOCK), 4), dtype="<u8")
        arrived, waiting = 0, np.empty(0, dtype=np.uint8)
        for block in blocks:
            if block.ndim != 1 or block.dtype != np.uint8:
                raise RowStoreError(f"classes must be uint8 [n], found {block.dtype} {list(block.shape)}")
            if block.size and int(block.max()) >= CLASSES:
                at = int((block >= CLASSES).argmax())
                raise RowStoreError(f"row {arrived + at} has class {block[at]}; classes are 0 to {CLASSES - 1}")
            if arrived + len(block) > rows:
                raise RowStoreError(f"more classes arrive than the {rows} rows announced")
            begin = (arrived - len(waiting)) // BLOCK
            arrived += len(block)
            block = np.concatenate([waiting, block])
            whole = len(block) if arrived == rows else len(block) // BLOCK * BLOCK
            _fill(records[begin:], block[:whole])
            waiting = block[whole:]
        if arrived != rows:
            raise RowStoreError(f"classes of {arrived} rows arrived of the {rows} announced")
        before = np.zeros(CLASSES, dtype=np.int64)
        for at in range(0, len(records), _AT_ONCE):
            part = records[at : at + _AT_ONCE]
            before = _set_ranks(part, before)
        return cls(rows, records)

    def split(self, rows_N: Ints) -> list[Share]:
        """The classes of rows that lie in the table, and what each class has of them."""
        counts, places_N, ranks_N = dispatch.ops().split_rows(self.records, rows_N)
        shares, begin = [], 0
        for number, count in enumerate(counts):
            if count:
                places = None if count == len(rows_N) else places_N[begin : begin + count]
                shares.append(Share(number, places, ranks_N[begin : begin + count]))
                begin += count
        return shares

    def classes(self, begin: int, end: int) -> Bytes:
        """The classes of rows begin … end, uint8."""
        first = begin // BLOCK
        planes = self.records[first : -(-end // BLOCK), :2]
        low, high = (
            np.unpackbits(np.ascontiguousarray(planes[:, i]).view(np.uint8), bitorder="little") for i in (0, 1)
        )
        found: Bytes = (low | high << np.uint8(1))[begin - first * BLOCK : end - first * BLOCK]
        return found

    def before(self, row: int) -> list[int]:
        """Rows of each class among the first `row` ones."""
        if row == self.rows:
            return list(self.counts)
        first = row // BLOCK * BLOCK
        pair, last = (int(word) for word in self.records[row // BLOCK, 2:])
        others = [pair & ((1 << 32) - 1), pair >> 32, last]
        here = np.bincount(self.classes(first, row), minlength=CLASSES).tolist()
        return [count + more for count, more in zip([first - sum(others), *others], here, strict=True)]

    def check(self, path: Path) -> None:
        """RowStoreError where records are not what their planes make them: ranks, spare, bits behind the last row."""
        used = self.rows % BLOCK
        if used and bool((self.records[-1, :2] >> np.uint64(used)).any()):
            raise refused(path, f"has classes behind its last row {self.rows - 1}", "it was altered")
        before = np.zeros(CLASSES, dtype=np.int64)
        for at in range(0, len(self.records), _AT_ONCE):
            found = self.records[at : at + _AT_ONCE]
            expected = found.copy()
            before = _set_ranks(expected, before)
            wrong = np.flatnonzero((found != expected).any(axis=1))
            if wrong.size:
                block = at + int(wrong[0])
                what = "a spare number" if int(self.records[block, 3] >> _HALF) else "ranks"
                raise refused(
                    path, f"has {what} in the record of rows {block * BLOCK} to {block * BLOCK + BLOCK - 1} that its "
                    "classes do not give", "it was altered",
                )  # fmt: skip


def _fill(records: Words, class_N: Bytes) -> None:
    """The planes of rows in order, the last record filled up with zeros."""
    padded = np.zeros(-(-len(class_N) // BLOCK) * BLOCK, dtype=np.uint8)
    padded[: len(class_N)] = class_N
    for plane in (0, 1):
        bits = np.packbits(padded >> np.uint8(plane) & np.uint8(1), bitorder="little").view("<u8")
        records[: len(bits), plane] = bits


def _members(records: Words) -> NDArray[np.int64]:
    """Bits of class 1, 2 and 3 in each record: int64 [B, 3]."""
    low, high = records[:, 0], records[:, 1]
    return np.stack([np.bitwise_count(bits) for bits in (low & ~high, high & ~low, low & high)], axis=1).astype(
        np.int64
    )


def _set_ranks(records: Words, before: NDArray[np.int64]) -> NDArray[np.int64]:
    """Write the ranks of records in order; `before` and what is returned: rows of the classes before and after them."""
    after = before[1:] + np.cumsum(_members(records), axis=0)
    ranks = np.vstack([before[1:], after[:-1]]).astype(np.uint64)
    records[:, 2] = ranks[:, 0] | ranks[:, 1] << _HALF
    records[:, 3] = ranks[:, 2]
    return np.concatenate([[0], after[-1]])


def _totals(rows: int, records: Words) -> list[int]:
    others = [0, 0, 0]
    for at in range(0, len(records), _AT_ONCE):
        more = _members(records[at : at + _AT_ONCE]).sum(axis=0).tolist()
        others = [a + b for a, b in zip(others, more, strict=True)]
    return [rows - sum(others), *others]


def refused(path: Path, what: str, hint: str) -> RowStoreError:
    """An error of a class map."""
    return RowStoreError(f"class map {path} {what}", hint=hint)
