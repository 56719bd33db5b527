"""Rows through a codec at the speed of the disk: read ahead, encoded on all cores, measured, written behind.

Nothing here grows with a table. Shape letters: n rows of a block, D width.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Task
from engram.kernels import dispatch
from engram.kernels.codecs import Bytes, Codec, Floats
from engram.quantize.row_store import RowWriter
from engram.quantize.write_behind import forget

BLOCK_BYTES = 4 << 20
AHEAD = 4  # blocks
Buffer = TypeVar("Buffer")
Block = TypeVar("Block")


class StreamError(EngramError):
    """A table that cannot be read to its end."""


@dataclass
class RowErrors:
    """Errors of a table, gathered block by block; relative errors are ||x - x'|| / ||x||."""

    worst_row: int = -1
    worst_row_error: float = 0.0
    rows: int = 0
    lost: float = 0.0
    whole: float = 0.0

    def add(self, lost_n: NDArray[np.float64], whole_n: NDArray[np.float64]) -> None:
        """Count the next rows, as row_errors gives them. A row of zeros has no relative error and counts as 0."""
        share = np.sqrt(np.divide(lost_n, whole_n, out=np.zeros_like(lost_n), where=whole_n > 0))
        if len(share) and (self.worst_row < 0 or float(share.max()) > self.worst_row_error):
            self.worst_row, self.worst_row_error = self.rows + int(share.argmax()), float(share.max())
        self.rows += len(lost_n)
        self.lost += float(lost_n.sum())
        self.whole += float(whole_n.sum())

    @property
    def rel_error(self) -> float:
        """Of the table as a whole."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0


def read_ahead(
    starts: Sequence[int], ring: Sequence[Buffer], read: Callable[[int, Buffer], Block]
) -> Iterator[Block]:
    """What `read` makes of every start, in order, one thread ahead; each uses a buffer of `ring`, turn by turn.

    What is given out is valid until the next one is asked for.
    """
    waiting = deque(zip(starts, ring, strict=False))
    with ThreadPoolExecutor(1) as pool:
        asked = deque(pool.submit(read, start, buffer) for start, buffer in waiting)
        try:
            for place in range(len(starts)):
                yield asked.popleft().result()
                if place + len(ring) < len(starts):
                    asked.append(pool.submit(read, starts[place + len(ring)], ring[place % len(ring)]))
        finally:
            for future in asked:
                future.cancel()


@dataclass(frozen=True)
class FloatRows:
    """float32 rows in a file, one after another from byte `offset` on."""

    path: Path
    offset: int
    rows: int
    width: int

    def blocks(self, count: int, first: int = 0) -> Iterator[Floats]:
        """Rows from `first` on, `count` at a time: [n, D], each valid until the next one is asked for.

        They are read ahead, and what was read is dropped from the page cache. StreamError where the file ends too soon.
        """
        starts = range(first, self.rows, count)
        ring = [np.empty((min(count, self.rows), self.width), dtype="<f4") for _ in range(min(AHEAD, len(starts)))]
        with self.path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), self.offset, 0, os.POSIX_FADV_SEQUENTIAL)
            yield from read_ahead(starts, ring, lambda start, block: self._read(file.fileno(), start, block))

    def _read(self, handle: int, start: int, block: Floats) -> Floats:
        rows = block[: self.rows - start]
        left, offset = rows.data.cast("B"), self.offset + 4 * self.width * start
        while left:
            done = os.preadv(handle, [left], offset)
            if not done:
                row = (offset - self.offset) // (4 * self.width)
                raise StreamError(f"table {self.path} ends within row {row} of {self.rows}", hint="it was truncated")
            left, offset = left[done:], offset + done
        forget(handle, self.offset, offset - self.offset)
        return rows


def block_rows(width: int, rows_per_page: int = 1) -> int:
    """Rows to encode at a time: about 4 MiB of float32, whole pages of the file that is written."""
    return max(1, BLOCK_BYTES // (4 * width * rows_per_page)) * rows_per_page


def encode_block(
    block_nD: Floats, codec: Codec, errors: RowErrors | None = None, *, table: str = "table", first_row: int = 0
) -> Bytes:
    """The rows as the codec stores them, made on all cores; what was lost goes to `errors`."""
    operations = dispatch.ops()
    encoded: Bytes = operations.encode(codec, block_nD, table=table, first_row=first_row, threads=0)
    if errors is not None:
        errors.add(*operations.row_errors(codec, encoded, block_nD, threads=0))
    return encoded


def stream_table(
    blocks: Iterable[Floats],
    writer: RowWriter,
    codec: Codec,
    errors: RowErrors,
    *,
    table: str = "table",
    first_row: int = 0,
    task: Task | None = None,
    after: Callable[[int], Any] | None = None,
) -> int:
    """Encode blocks one after another into a writer; returns the row behind the last one.

    `first_row` is the first block's place in the table; `after` is called with the number of rows done, block by block.
    CodecError names `table` and the row that the codec cannot hold.
    """
    done = first_row
    for block in blocks:
        writer.append(encode_block(block, codec, errors, table=table, first_row=done))
        done += len(block)
        if task is not None:
            task.advance(len(block))
        if after is not None:
            after(done)
    return done
