"""Rows of a table file: checked at open, verified page by page, resident within a budget.

Shape letters: N rows asked for, D width, K bytes a row, P pages, R rows a page.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from engram import Progress
from engram.builders.checkpoint import table_file
from engram.kernels import dispatch
from engram.kernels.codecs import Bytes, Codec, Floats
from engram.quantize.page_reader import (
    File,
    Ints,
    PageReader,
    Places,
    Run,
    Segment,
    Sums,
    Values,
    open_reader,
)
from engram.quantize.row_store import PAGE, Geometry, RowStoreError, RowWriter, TableFile, read_geometry
from engram.quantize.row_table import VERIFY, Budget, OneCodecRows, RowTable

_READ_PAGES = 256


class PagedTable(RowTable):
    """Rows that all have one codec and lie on checksummed pages of files.

    A file that changes while it is open is noticed by its size and times after each copy, before anybody sees the rows:
    one of another size is refused, the pages of one that was written to are compared again. A file truncated in the
    middle of a copy is a RowStoreError too (only the numpy way cannot promise that).
    """

    def __init__(
        self, path: Path, handles: Sequence[int], places: Places, *, codec: Codec, rows: int, width: int, layer: int,
        verify: str, io: str,
    ) -> None:  # fmt: skip
        self.path, self.verify = path, verify
        self.codec, self.rows, self.width, self.layer = codec, rows, width, layer
        self.codec_name, self.row_bytes = codec.name, codec.row_bytes(width)
        self.encoded_bytes = rows * self.row_bytes
        self.budget: Budget | None = None
        self._handles, self._places = list(handles), places
        self._reader: PageReader
        self._reader, self.io, self.why = open_reader(places, codec, verify=verify != "off", io=io)

    @property
    def paths(self) -> list[Path]:
        """The files that are open, as they are numbered in `Places`."""
        return [self.path]

    @property
    def pages_read(self) -> int:
        return self._reader.blocks_asked

    def ask(self, rows: Ints) -> Any:
        try:
            ticket = self._reader.ask(rows)
        except (TypeError, ValueError, BufferError):
            rows = np.ascontiguousarray(rows, dtype=np.int64)
            ticket = self._reader.ask(rows)
        if type(ticket) is int:
            self._refuse_row(int(rows.ravel()[ticket]))
        return ticket

    def take(self, ticket: Any, out: Values, *, threads: int = 1) -> Values:
        row = self.codec.code, self.codec.factor, self.width
        try:
            if self.budget is None:
                wrong = self._reader.take(ticket, out, *row, threads, 0, -1)
            else:
                for begin, end in self._pieces(ticket, self.budget):
                    wrong = self._reader.take(ticket, out, *row, threads, begin, end)
                    self.budget.settle()
                    if wrong is not None:
                        break
                else:
                    wrong = None
        except (TypeError, ValueError, BufferError) as error:
            raise self._misused(error) from None
        if wrong is not None:
            self._refuse(wrong)
        return out

    def arrived(self, ticket: Any) -> bool:
        return bool(ticket.done)

    def stored_bytes(self, ticket: Any, rows: int) -> int:
        return rows * self.row_bytes

    def gather(self, rows: Ints, out: Bytes | None = None, *, threads: int = 1) -> Bytes:
        """Encoded rows by id, int64 [N] to uint8 [N, K], written into `out` where given. Raises as `take` does."""
        if out is None:
            out = np.empty((len(rows), self.row_bytes), dtype=np.uint8)
        ticket = self.ask(rows)
        try:
            for begin, end in [(0, -1)] if self.budget is None else self._pieces(ticket, self.budget):
                wrong = self._reader.copy(ticket, out, threads, begin, end)
                if self.budget is not None:
                    self.budget.settle()
                if wrong is not None:
                    self._refuse(wrong)
        except (TypeError, ValueError, BufferError) as error:
            raise self._misused(error) from None
        return out

    def _pieces(self, ticket: Any, budget: Budget) -> Iterator[tuple[int, int]]:
        edges = self._reader.pieces(ticket, budget.folios)
        return zip(edges[:-1], edges[1:], strict=True)

    def check_ids(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.rows:
            self._refuse_row(lowest if lowest < 0 else highest)

    def _refuse_row(self, row: int) -> NoReturn:
        raise RowStoreError(
            f"row {row} is outside the table of layer {self.layer} in {self.path}, which has {self.rows} rows",
            hint="the rows were hashed with another layout than the table's",
        )

    def _misused(self, error: Exception) -> RowStoreError:
        return RowStoreError(f"rows of {self.what} {self.path} cannot be handed over: {error}")

    def _refuse(self, wrong: tuple[str, int, int]) -> NoReturn:
        """Put an outcome of the reader into words."""
        kind, file, number = wrong
        path = self.paths[file] if 0 <= file < len(self.paths) else self.path
        name = f"{self.what} {path} (layer {self.layer})"
        if kind == "damaged":
            self._refuse_block(number)
        if kind == "resized":
            raise RowStoreError(
                f"{name} has {number} bytes, it had {self._places.files[file].bytes} when it was opened",
                hint="it was changed while in use: restore it and start again",
            )
        if kind == "unsteady":
            raise RowStoreError(f"{name} is being written to", hint="restore it and start again")
        if kind == "rewritten":
            raise RowStoreError(
                f"{name} was overwritten while in use: its checksums are not those that it had when it was opened",
                hint="start again to use the new one",
            )
        why = os.strerror(number) if kind == "unreadable" else "it was truncated, or its device failed"
        raise RowStoreError(f"{name} cannot be read while in use: {why}", hint="restore it and start again")

    @abstractmethod
    def _refuse_block(self, number: int) -> NoReturn:
        """The block with this checksum does not match it."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[int, Bytes]]:
        """(first row, encoded rows [n, K]) of the whole table in order, read beside the mapping; always verified."""

    def decoded_blocks(self, out: Floats | None = None) -> Iterator[tuple[int, Floats]]:
        for first, block in self.blocks():
            part = None if out is None else out[first : first + len(block)]
            yield first, self.codec.decode(block, self.width, out=part)

    def in_memory(self, advance: Callable[[int], None]) -> OneCodecRows:
        held = np.empty((self.rows, self.row_bytes), dtype=np.uint8)
        for first, block in self.blocks():
            held[first : first + len(block)] = block
            advance(len(block))
        return OneCodecRows(self.codec, held, self.width)

    def copy(self, folder: Path, progress: Progress) -> dict[str, Any]:
        name = table_file(self.layer)
        with progress.task(f"layer {self.layer}", self.rows, "rows") as task:
            return {"file": name, **asdict(self.copy_rows(folder / name, task.advance))}

    def copy_rows(self, target: Path, advance: Callable[[int], None]) -> TableFile:
        """Write the rows, verified, into a table file; what a manifest records of it."""
        with RowWriter(target, self.rows, self.width, self.codec, self.layer) as writer:
            for _, block in self.blocks():
                writer.append(block)
                advance(len(block))
        assert writer.table_file is not None
        return writer.table_file

    def verify_all(self) -> None:
        for _ in self.blocks():
            pass
        self._reader.mark_verified()

    def _read(self, file: int, count: int, offset: int) -> bytes:
        """Bytes of a file, read beside the mapping."""
        try:
            data = os.pread(self._handles[file], count, offset)
        except OSError as error:
            self._refuse(("unreadable", file, error.errno or 0))
        if len(data) != count:
            size = os.fstat(self._handles[file]).st_size
            self._refuse(("resized", file, size) if size != self._places.files[file].bytes else ("unsteady", file, 0))
        return data

    def set_budget(self, budget: Budget | None) -> None:
        self.budget = budget
        self._reader.set_bounded(budget is not None)

    def trim(self) -> None:
        self._reader.trim()

    def close(self) -> None:
        self._reader.withdraw()
        self._reader = _Closed(self)
        while self._handles:
            os.close(self._handles.pop())


class _Closed:
    """Stands for the reader of a closed table: whatever it is asked is an error, but to let go of memory."""

    def __init__(self, table: PagedTable) -> None:
        self._what = f"{table.what} {table.path} (layer {table.layer}) is closed"

    def _refuse(self, *_: Any) -> NoReturn:
        raise RowStoreError(self._what)

    ask = take = copy = pieces = mark_verified = _refuse

    def trim(self) -> None:
        pass

    withdraw = trim

    def set_bounded(self, bounded: bool) -> None:
        pass

    @property
    def blocks_asked(self) -> int:
        self._refuse()


class MappedTable(PagedTable):
    """One table file (FORMAT.md section 1): packed pages, one checksum a page."""

    def __init__(self, path: Path, handle: int, geometry: Geometry, verify: str, io: str) -> None:
        self.geometry = geometry
        self.rows_per_page, self.pages = geometry.rows_per_page, geometry.pages
        self.file_bytes, self._begin = geometry.file_bytes, len(geometry.header)
        places = Places(
            files=[File(handle, geometry.file_bytes)],
            runs=[Run(0, self._begin // PAGE, self.pages, 0)],
            parts=[[Segment(0, geometry.rows, 0, self._begin, PAGE, self.rows_per_page, geometry.row_bytes)]],
            rows=geometry.rows,
            sums=Sums(0, self._begin + self.pages * PAGE, self.pages),
        )
        super().__init__(
            path, [handle], places, codec=geometry.codec, rows=geometry.rows, width=geometry.width,
            layer=geometry.layer, verify=verify, io=io,
        )  # fmt: skip

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
        io: str = "auto",
    ) -> MappedTable:
        """Open a table file after checking its header and size, and that it is the table expected (where given).

        Raises RowStoreError for a file that is missing, unreadable, damaged, of another version, or another table, and
        for an `io` that this system cannot do.
        """
        if verify not in VERIFY:
            raise RowStoreError(f"verify {verify!r} is not known", hint="use one of: " + ", ".join(VERIFY))
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as wrong:
            raise RowStoreError(f"table file {path} cannot be opened: {wrong.strerror}") from None
        try:
            geometry = read_geometry(handle, path)
            check_expected(path, geometry, codec=codec, rows=rows, width=width, layer=layer)
            table = cls(path, handle, geometry, verify, io)
        except BaseException:
            os.close(handle)
            raise
        if verify == "open":
            try:
                table.verify_all()
            except BaseException:
                table.close()
                raise
        return table

    def _refuse_block(self, number: int) -> NoReturn:
        begin, end = self.geometry.page_rows(number)
        raise RowStoreError(
            f"table file {self.path} (layer {self.layer}) is damaged: page {number}, rows {begin} to {end - 1}, "
            "does not match its checksum",
            hint="copy the file again, or export the package again",
        )

    def blocks(self) -> Iterator[tuple[int, Bytes]]:
        used = self.rows_per_page * self.row_bytes
        for page in range(0, self.pages, _READ_PAGES):
            count = min(_READ_PAGES, self.pages - page)
            content = np.frombuffer(self._read(0, count * PAGE, self._begin + page * PAGE), np.uint8)
            content = content.reshape(count, PAGE)
            sums = np.frombuffer(self._read(0, count * 4, self._begin + self.pages * PAGE + page * 4), "<u4")
            wrong = np.flatnonzero(dispatch.ops().crc32_pages(content) != sums)
            if wrong.size:
                self._refuse_block(page + int(wrong[0]))
            begin = page * self.rows_per_page
            rows = content[:, :used].reshape(-1, self.row_bytes)
            yield begin, rows[: self.rows - begin]

    def seal(self) -> str:
        """SHA-256 of the file without its pages: header and checksums."""
        digest = hashlib.sha256(self.geometry.header)
        end = self.geometry.file_bytes
        for offset in range(self._begin + self.pages * PAGE, end, 1 << 20):
            digest.update(self._read(0, min(1 << 20, end - offset), offset))
        return digest.hexdigest()


def check_expected(path: Path, found: Any, **expected: str | int | None) -> None:
    """Refuse a table whose codec, rows, width or layer is not the expected one, where one is given."""
    for name, value in expected.items():
        is_ = found.codec.name if name == "codec" else getattr(found, name)
        if value is not None and value != is_:
            raise RowStoreError(
                f"table file {path} has {name} {is_!r}, expected {value!r}",
                hint="it belongs to another layer or another package",
            )
