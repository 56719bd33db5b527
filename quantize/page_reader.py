"""Rows of files: where they are, the ways to read them, and the readable one of these ways, in numpy.

The others are in C++ (kernels/csrc/pages*.cpp) and take the same arguments. A reader knows nothing of formats: it is
told where rows lie and where the CRC-32 of every 4 KiB block is, and answers with None or with what went wrong.

Shape letters: N rows asked for, K bytes a row.
"""

from __future__ import annotations

import importlib
import mmap
import os
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from engram.kernels.codecs import Bytes, Codec
from engram.quantize.row_store import PAGE, RowStoreError

Ints = NDArray[np.int64]
Values = NDArray[np.float32] | NDArray[np.uint16]
Outcome = tuple[str, int, int] | None  # what went wrong: kind, number of the file, a number that belongs to the kind

IO = ("auto", "mmap", "uring", "pread", "numpy")
FOLIO = 1 << 21  # one fault may map a whole large folio of the page cache, up to 2 MiB on Linux (measured: it does)


class File(NamedTuple):
    """An open file and the size that it must keep."""

    handle: int
    bytes: int


class Run(NamedTuple):
    """Blocks of a file that lie together and hold rows; `first_sum` is the number of the first one's checksum."""

    file: int
    first_block: int
    blocks: int
    first_sum: int


class Segment(NamedTuple):
    """Evenly spaced rows: row i (counted from first_row) at offset + i // per_page * pitch + i % per_page * bytes."""

    first_row: int
    rows: int
    run: int
    offset: int
    pitch: int
    per_page: int
    bytes: int


class Sums(NamedTuple):
    """Where the checksums are: `number` little-endian CRC-32 of blocks."""

    file: int
    offset: int
    number: int


@dataclass(frozen=True)
class Places:
    """Where the rows of a table are. A row is the bytes of its parts, one after another."""

    files: Sequence[File]
    runs: Sequence[Run]
    parts: Sequence[Sequence[Segment]]
    rows: int
    sums: Sums

    @property
    def row_bytes(self) -> int:
        """K."""
        return sum(part[0].bytes for part in self.parts)


class PageReader(Protocol):
    """One way to get at rows. Threads may share it."""

    def ask(self, rows: Ints) -> Any:
        """A ticket, or the place (int) of the first id outside the table. The device is asked in the background."""

    def take(
        self, ticket: Any, out: Values, code: int, factor: float, width: int, threads: int, begin: int, end: int
    ) -> Outcome:
        """Wait, verify, and decode rows begin … end (-1: all) of the ticket into their places of `out` [N, D]."""

    def copy(self, ticket: Any, out: Bytes, threads: int, begin: int, end: int) -> Outcome:
        """The same for their bytes, [N, K]."""

    def pieces(self, ticket: Any, folios: int) -> list[int]:
        """Edges of pieces of the ticket's rows, each with fewer than `folios` changes of 2 MiB stretch."""

    def trim(self) -> None:
        """Give back memory through which files are seen; forget what was asked for."""

    def set_bounded(self, bounded: bool) -> None:
        """Whether memory is bounded: then nothing is mapped in before it is taken."""

    def mark_verified(self) -> None:
        """Every block was compared with its checksum since this reader was made."""

    def withdraw(self) -> None:
        """End what goes on in the background: the reader is about to be let go."""

    @property
    def blocks_asked(self) -> int:
        """Blocks of 4096 bytes asked of the device so far."""


def open_reader(places: Places, codec: Codec, *, verify: bool, io: str) -> tuple[PageReader, str, str]:
    """A reader, the name of its way, and why it was chosen.

    Raises RowStoreError for a way that is not known, and for one asked for by name that this system cannot go.
    """
    if io not in IO:
        raise RowStoreError(f"io {io!r} is not known", hint="use one of: " + ", ".join(IO))
    if io == "numpy":
        return NumpyReader(places, codec, verify), io, "asked for by name"
    kernels = _kernels()
    if kernels is None:
        if io != "auto":
            raise RowStoreError(
                f"io {io!r} needs the C++ kernels, which are not built",
                hint="leave --table-io out, or install again with a C++17 compiler",
            )
        return NumpyReader(places, codec, verify), "numpy", "the C++ kernels are not built"
    arguments = (
        list(places.files), list(places.runs), [list(part) for part in places.parts], places.rows, places.sums, verify
    )  # fmt: skip
    why = "asked for by name"
    if io == "auto":
        try:
            reader = kernels.open_pages("mmap", *arguments)
            return reader, "mmap", f"the fastest on {sys.platform}, whether rows are in memory or not"
        except RuntimeError as wrong:
            io, why = "pread", f"the files cannot be mapped: {wrong}"
    try:
        return kernels.open_pages(io, *arguments), io, why
    except (RuntimeError, ValueError) as wrong:
        raise RowStoreError(f"io {io!r} cannot be used here: {wrong}", hint="leave --table-io out") from None


def _kernels() -> Any:
    """The C++ extension, or None where it is not built."""
    try:
        return importlib.import_module("engram.kernels._C")
    except ImportError:
        return None


def _check_out(out: NDArray[Any], kinds: tuple[str, ...], size: int) -> None:
    if out.dtype.name not in kinds or out.size != size or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be {size} contiguous values of {' or '.join(kinds)}")


@dataclass(frozen=True)
class _Ticket:
    starts: Sequence[Ints]  # of every part: where in the mapped files each row begins
    asked: Future[None] | None
    size: int

    @property
    def done(self) -> bool:
        return self.asked is None or self.asked.done()


class NumpyReader:
    """The reference: the whole files mapped, rows taken by fancy indexing, marks in a byte array.

    A file truncated in the microseconds between the look at its size and the copy stops the process (SIGBUS); the C++
    ways have no such gap.
    """

    def __init__(self, places: Places, codec: Codec, verify: bool) -> None:
        self.places, self.codec, self.verify = places, codec, verify
        self.blocks_asked = 0
        self._maps = [mmap.mmap(f.handle, f.bytes, access=mmap.ACCESS_READ) for f in places.files]
        for mapped in self._maps:
            for advice in ("MADV_RANDOM", "MADV_NOHUGEPAGE"):  # no read-ahead around a row, no huge mappings
                try:
                    mapped.madvise(getattr(mmap, advice))
                except (AttributeError, OSError):
                    pass  # the system has no such advice
        self._bytes = [np.frombuffer(mapped, np.uint8) for mapped in self._maps]
        sums = places.sums
        self._sums = np.frombuffer(self._maps[sums.file], "<u4", sums.number, sums.offset)
        # Marks are one for each checksum: runs of blocks one after another.
        self._verified = np.zeros(sums.number, dtype=bool)
        self._asked = np.zeros(sums.number, dtype=bool)
        self._stamps = self._now()
        self._sums_crc32 = zlib.crc32(self._sums.data) if verify else 0  # another table has other checksums
        self._pool: ThreadPoolExecutor | None = None

    def ask(self, rows: Ints) -> _Ticket | int:
        outside = (rows < 0) | (rows >= self.places.rows)
        if outside.any():
            return int(outside.ravel().argmax())
        starts = [self._starts(part, rows.ravel()) for part in self.places.parts]
        blocks = np.unique(np.concatenate([self._blocks(i, starts[i]) for i in range(len(starts))]))
        fresh = blocks[~self._asked[blocks]]
        asked = None
        if fresh.size and hasattr(os, "posix_fadvise"):
            self._asked[fresh] = True
            self.blocks_asked += len(fresh)
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, thread_name_prefix="engram-read-ahead")
            asked = self._pool.submit(self._read_ahead, fresh)
        return _Ticket(starts, asked, rows.size)

    def take(
        self, ticket: _Ticket, out: Values, code: int, factor: float, width: int, threads: int, begin: int, end: int
    ) -> Outcome:
        _check_out(out, ("float32", "uint16"), ticket.size * width)
        end = ticket.size if end < 0 else end
        encoded_NK = np.empty((end - begin, self.places.row_bytes), dtype=np.uint8)
        if (wrong := self._copy(ticket, encoded_NK, begin, end)) is None:
            self.codec.decode(encoded_NK, width, out=out.reshape(ticket.size, width)[begin:end])
        return wrong

    def copy(self, ticket: _Ticket, out: Bytes, threads: int, begin: int, end: int) -> Outcome:
        _check_out(out, ("uint8",), ticket.size * self.places.row_bytes)
        end = ticket.size if end < 0 else end
        return self._copy(ticket, out.reshape(ticket.size, self.places.row_bytes)[begin:end], begin, end)

    def _copy(self, ticket: _Ticket, out: Bytes, begin: int, end: int) -> Outcome:
        if ticket.asked is not None:
            ticket.asked.result()
        for _ in range(8):
            wrong = self._changed() or (self._compare(ticket, begin, end) if self.verify else None)
            if wrong is None:
                self._gather(ticket, out, begin, end)
            stamps = self._now()
            if stamps == self._stamps:
                return wrong
        return wrong or ("unsteady", 0, 0)

    def _gather(self, ticket: _Ticket, out: Bytes, begin: int, end: int) -> None:
        column = 0
        for part, starts in zip(self.places.parts, ticket.starts, strict=True):
            width = part[0].bytes
            # Every place where a row can begin, as one item: overlapping items, one byte apart.
            target = np.ndarray((end - begin,), f"V{width}", out, column, (out.strides[0],)) if end > begin else out
            for file, first, content in self._files():
                here = (starts[begin:end] >= first) & (starts[begin:end] < first + len(content))
                if here.any():
                    items = np.ndarray((len(content) - width + 1,), f"V{width}", content.data, strides=(1,))
                    target[here] = items[starts[begin:end][here] - first]
            column += width

    def _files(self) -> list[tuple[int, int, Bytes]]:
        """Number, place in the line of all files, and bytes of each."""
        firsts = np.cumsum([0, *(file.bytes for file in self.places.files)]).tolist()
        return [(i, firsts[i], self._bytes[i]) for i in range(len(self._bytes))]

    def _starts(self, part: Sequence[Segment], rows: Ints) -> Ints:
        """Where rows begin, in the line of all files."""
        firsts = np.cumsum([0, *(file.bytes for file in self.places.files)])
        which = np.searchsorted([s.first_row for s in part], rows, side="right") - 1
        starts = np.empty(len(rows), dtype=np.int64)
        for i in np.unique(which).tolist():
            s, here = part[i], which == i
            local = rows[here] - s.first_row
            place = s.offset + local // s.per_page * s.pitch + local % s.per_page * s.bytes
            starts[here] = firsts[self.places.runs[s.run].file] + place
        return starts

    def _blocks(self, part: int, starts: Ints) -> Ints:
        """Numbers of the checksums of the blocks that rows touch, ascending."""
        firsts = np.cumsum([0, *(file.bytes for file in self.places.files)])
        found = [np.empty(0, dtype=np.int64)]
        for run in self.places.runs:
            begin = firsts[run.file] + run.first_block * PAGE
            here = starts[(starts >= begin) & (starts < min(begin + run.blocks * PAGE, firsts[run.file + 1]))]
            first, last = (here - begin) // PAGE, (here + self.places.parts[part][0].bytes - 1 - begin) // PAGE
            found += [run.first_sum + first, run.first_sum + last]
        return np.unique(np.concatenate(found))

    def _compare(self, ticket: _Ticket, begin: int, end: int) -> Outcome:
        """Compare the checksums of those blocks of the rows that were not compared yet."""
        for part, starts in enumerate(ticket.starts):
            blocks = self._blocks(part, starts[begin:end])
            for number in blocks[~self._verified[blocks]].tolist():
                run = self._run(number)
                at = (run.first_block + number - run.first_sum) * PAGE
                if zlib.crc32(self._bytes[run.file][at : at + PAGE].data) != int(self._sums[number]):
                    return "damaged", run.file, number
                self._verified[number] = True
        return None

    def _run(self, number: int) -> Run:
        return next(run for run in self.places.runs if run.first_sum <= number < run.first_sum + run.blocks)

    def _now(self) -> list[tuple[int, int, int]]:
        stats = [os.fstat(file.handle) for file in self.places.files]
        return [(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]

    def _changed(self) -> Outcome:
        """Refuse a file that has another size; distrust the blocks of one that was written to."""
        now = self._now()
        for i, (file, (size, _, _)) in enumerate(zip(self.places.files, now, strict=True)):
            if size != file.bytes:
                return "resized", i, size
        if now != self._stamps:
            self._verified[...] = False
            self._stamps = now
        if self.verify and not self._verified.any() and zlib.crc32(self._sums.data) != self._sums_crc32:
            return "rewritten", self.places.sums.file, 0
        return None

    def _read_ahead(self, blocks: Ints) -> None:
        """Ask the kernel to read blocks (ascending); returns once all are asked for, which may take as long."""
        edges = np.flatnonzero(np.diff(blocks) > 1) + 1
        for first, last in zip(blocks[np.r_[0, edges]].tolist(), blocks[np.r_[edges - 1, -1]].tolist(), strict=True):
            while first <= last:  # a stretch of checksums may go over to the next run
                run = self._run(first)
                count = min(last + 1, run.first_sum + run.blocks) - first
                handle, at = self.places.files[run.file].handle, (run.first_block + first - run.first_sum) * PAGE
                # The same read-ahead as madvise(WILLNEED), but Python lets other threads run while it blocks.
                os.posix_fadvise(handle, at, count * PAGE, os.POSIX_FADV_WILLNEED)
                first += count

    def pieces(self, ticket: _Ticket, folios: int) -> list[int]:
        changes = np.zeros(max(0, ticket.size), dtype=np.int64)
        for starts in ticket.starts:
            changes[1:] += np.diff(starts // FOLIO) != 0
        turns = np.cumsum(changes) // folios
        return [0, *(np.flatnonzero(np.diff(turns)) + 1).tolist(), ticket.size]

    def trim(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
        self._asked[...] = False

    def set_bounded(self, bounded: bool) -> None:
        pass  # nothing is ever touched before it is taken

    def withdraw(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def mark_verified(self) -> None:
        if self._now() == self._stamps:
            self._verified[...] = True
