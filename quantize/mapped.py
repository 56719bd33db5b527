"""Rows of a table file through a memory map: checked at open, verified page by page, resident within a budget.

Shape letters: N rows asked for, K bytes a row, P pages, R rows a page.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram.kernels.codecs import Bytes
from engram.quantize.row_store import PAGE, Geometry, RowStoreError, read_geometry

Ints = NDArray[np.int64]

VERIFY = ("first-touch", "open", "off")
FOLIO = 1 << 21  # one fault may map a whole large folio of the page cache, up to 2 MiB on Linux (measured: it does)
_READ_PAGES = 256
_VERIFIED, _ASKED = np.uint8(1), np.uint8(2)


class Budget:
    """A bound on the bytes of table files that the process keeps mapped in, shared by the tables that it adopts.

    Before each gather the rows are cut into pieces that can map in at most half of the bound; after each piece the
    process's resident file pages are read from the kernel, and once they grew by more than the other half, the mappings
    are emptied (MADV_DONTNEED; the page cache keeps what it likes). Memory is thus held to the bound, or to one folio
    a table where the bound is smaller than that.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self.trims = 0
        self._tables: list[MappedTable] = []
        self._base = _resident_file_bytes()

    def adopt(self, table: MappedTable) -> None:
        """Let this budget bound the table's mapping."""
        self._tables.append(table)
        table.budget = self

    def pieces(self, pages: Ints) -> Iterator[slice]:
        """Cut a gather that touches these pages, in order, so that no piece can map in more than half of the bound."""
        folios = pages // (FOLIO // PAGE)
        turns = np.cumsum(np.diff(folios, prepend=folios[:1]) != 0) // max(1, self.limit // FOLIO // 2)
        edges = [0, *(np.flatnonzero(np.diff(turns)) + 1).tolist(), len(pages)]
        return (slice(begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True))

    def settle(self) -> None:
        """Empty the mappings if they have grown beyond their half, or if the kernel does not tell."""
        now = _resident_file_bytes()
        self._base = min(self._base, now)
        if not now or now - self._base > self.limit // 2:
            for table in self._tables:
                table.trim()
            self.trims += 1
            self._base = _resident_file_bytes()


def _resident_file_bytes() -> int:
    """Resident pages of files and shared memory in this process; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(200).split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


class MappedTable:
    """One table file, mapped. Threads may share it: all that calls change are marks whose loss costs time only.

    `verify` says when a page's checksum is compared: "first-touch" (before a row of it is first used), "open" (all of
    them in `open`) or "off". A file that changes while it is mapped is noticed by its size and modification time before
    each gather: truncated, it is refused; otherwise its pages count as unverified again. What remains is a file that
    is truncated in the microseconds between that check and the copy: then the kernel stops the process (SIGBUS).
    """

    def __init__(self, path: Path, handle: int, geometry: Geometry, verify: str) -> None:
        self.path, self.geometry, self.verify = path, geometry, verify
        self.codec, self.rows, self.width, self.layer = geometry.codec, geometry.rows, geometry.width, geometry.layer
        self.row_bytes, self.rows_per_page, self.pages = geometry.row_bytes, geometry.rows_per_page, geometry.pages
        self.budget: Budget | None = None
        self._handle, self._bytes, self._begin = handle, geometry.file_bytes, len(geometry.header)
        self._stamp = os.fstat(handle).st_mtime_ns
        self._map = mmap.mmap(handle, self._bytes, access=mmap.ACCESS_READ)
        for advice in ("MADV_RANDOM", "MADV_NOHUGEPAGE"):  # no read-ahead around a row, no huge mappings
            if hasattr(mmap, advice):
                try:
                    self._map.madvise(getattr(mmap, advice))
                except OSError:
                    pass  # a kernel built without huge pages knows no advice about them
        self._sums = np.frombuffer(self._map, "<u4", self.pages, self._begin + self.pages * PAGE)
        self._page_bytes = np.frombuffer(self._map, np.uint8, self.pages * PAGE, self._begin).reshape(-1, PAGE)
        # Every place where a row can begin, as one item: overlapping items of K bytes, `unit` bytes apart.
        self._unit = math.gcd(PAGE, self.row_bytes)
        places = (self.pages * PAGE - self.row_bytes) // self._unit + 1
        self._items = np.ndarray((places,), f"V{self.row_bytes}", self._page_bytes.data, strides=(self._unit,))
        self._marks = np.zeros(self.pages, dtype=np.uint8)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        codec: str | None = None,
        rows: int | None = None,
        width: int | None = None,
        layer: int | None = None,
        verify: str = "first-touch",
    ) -> MappedTable:
        """Map a table file after checking its header and size, and that it is the table expected (where given).

        Raises RowStoreError for a file that is missing, unreadable, damaged, of another version, or another table.
        """
        if verify not in VERIFY:
            raise RowStoreError(f"verify {verify!r} is not known", hint="use one of: " + ", ".join(VERIFY))
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as wrong:
            raise RowStoreError(f"table file {path} cannot be opened: {wrong.strerror}") from None
        try:
            geometry = read_geometry(handle, path)
            found = {
                "codec": geometry.codec.name, "rows": geometry.rows, "width": geometry.width, "layer": geometry.layer
            }  # fmt: skip
            for name, value in {"codec": codec, "rows": rows, "width": width, "layer": layer}.items():
                if value is not None and value != found[name]:
                    raise RowStoreError(
                        f"table file {path} has {name} {found[name]!r}, expected {value!r}",
                        hint="it belongs to another layer or another package",
                    )
            table = cls(path, handle, geometry, verify)
        except BaseException:
            os.close(handle)
            raise
        if verify == "open":
            try:
                for _ in table.blocks():
                    pass
            except BaseException:
                table.close()
                raise
            table._marks |= _VERIFIED
        return table

    def gather(self, rows: Ints, out: Bytes | None = None) -> Bytes:
        """Encoded rows by id, int64 [N] to uint8 [N, K], written into `out` where given.

        Raises RowStoreError for an id outside the table, a page whose checksum does not match its bytes, and a file
        that was truncated; `out` is then undefined.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if out is None:
            out = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        if not len(rows):
            return out
        self.check_ids(int(rows.min()), int(rows.max()))
        pages = rows // self.rows_per_page
        starts = (pages * PAGE + (rows - pages * self.rows_per_page) * self.row_bytes) // self._unit
        target = out.view(f"V{self.row_bytes}")[:, 0]
        for piece in (slice(None),) if self.budget is None else self.budget.pieces(pages):
            self._check_file()
            if self.verify != "off":
                self._verify(pages[piece])
            target[piece] = self._items[starts[piece]]
            if self.budget is not None:
                self.budget.settle()
        return out

    def check_ids(self, lowest: int, highest: int) -> None:
        """Refuse row ids outside the table."""
        if lowest < 0 or highest >= self.rows:
            raise RowStoreError(
                f"row {lowest if lowest < 0 else highest} is outside the table of layer {self.layer} in {self.path}, "
                f"which has {self.rows} rows",
                hint="the rows were hashed with another layout than the table's",
            )

    def _check_file(self) -> None:
        """Refuse a file that shrank under the mapping; distrust the pages of one that was written to."""
        now = os.fstat(self._handle)
        if now.st_size != self._bytes:
            raise RowStoreError(
                f"table file {self.path} (layer {self.layer}) has {now.st_size} bytes, "
                f"it had {self._bytes} when it was opened",
                hint="it was changed while in use: restore it and start again",
            )
        if now.st_mtime_ns != self._stamp:
            self._stamp = now.st_mtime_ns
            self._marks &= ~_VERIFIED

    def _verify(self, pages: Ints) -> None:
        """Compare the checksums of those of the pages that were not compared yet."""
        fresh = pages[self._marks[pages] & _VERIFIED == 0]
        if fresh.size:
            for page in np.unique(fresh).tolist():
                self._compare(page, zlib.crc32(self._page_bytes[page].data))
                self._marks[page] |= _VERIFIED

    def _compare(self, page: int, crc32: int) -> None:
        if crc32 != int(self._sums[page]):
            begin, end = self.geometry.page_rows(page)
            raise RowStoreError(
                f"table file {self.path} (layer {self.layer}) is damaged: page {page}, rows {begin} to {end - 1}, "
                "does not match its checksum",
                hint="copy the file again, or export the package again",
            )

    def claim(self, pages: Ints) -> Ints:
        """Those of the pages (ascending) that nobody asked for yet; they count as asked for from now on."""
        fresh: Ints = pages[self._marks[pages] & _ASKED == 0]
        self._marks[fresh] |= _ASKED
        return fresh

    def read_ahead(self, pages: Ints) -> None:
        """Ask the kernel to read pages (ascending); returns once all are asked for, which may take as long as reading.

        A page that the kernel dropped again costs an ordinary page fault later, never a wrong row.
        """
        if not pages.size or not hasattr(os, "posix_fadvise"):
            return
        edges = np.flatnonzero(np.diff(pages) > 1) + 1
        for begin, end in zip(pages[np.r_[0, edges]].tolist(), pages[np.r_[edges - 1, -1]].tolist(), strict=True):
            # The same read-ahead as madvise(WILLNEED), but Python lets other threads run while it blocks.
            os.posix_fadvise(self._handle, self._begin + begin * PAGE, (end - begin + 1) * PAGE, os.POSIX_FADV_WILLNEED)

    def blocks(self) -> Iterator[tuple[int, Bytes]]:
        """(first row, encoded rows [n, K]) of the whole table in order, read beside the mapping; always verified."""
        used = self.rows_per_page * self.row_bytes
        for page in range(0, self.pages, _READ_PAGES):
            count = min(_READ_PAGES, self.pages - page)
            data = os.pread(self._handle, count * PAGE, self._begin + page * PAGE)
            if len(data) != count * PAGE:
                self._check_file()
                raise RowStoreError(f"table file {self.path} cannot be read at page {page}")
            content = np.frombuffer(data, np.uint8).reshape(count, PAGE)
            for i in range(count):
                self._compare(page + i, zlib.crc32(content[i].data))
            begin = page * self.rows_per_page
            rows = content[:, :used].reshape(-1, self.row_bytes)
            yield begin, rows[: self.rows - begin]

    def seal(self) -> str:
        """SHA-256 of the file without its pages: header and checksums, which together pin every byte."""
        digest = hashlib.sha256(self.geometry.header)
        for offset in range(self._begin + self.pages * PAGE, self._bytes, 1 << 20):
            digest.update(os.pread(self._handle, min(1 << 20, self._bytes - offset), offset))
        return digest.hexdigest()

    def trim(self) -> None:
        """Give back the memory through which this process sees the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        self._marks &= ~_ASKED

    def close(self) -> None:
        """Unmap the file; the table cannot be used afterwards."""
        if self._handle >= 0:
            del self._sums, self._page_bytes, self._items
            try:
                self._map.close()
            except BufferError:
                pass  # a traceback still holds a view: the file is unmapped when that is dropped
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
