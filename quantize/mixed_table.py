"""Rows of a mixed table: up to four classes of rows, each in a table file with its own codec, or dropped.

The class map (class_map.py) is read whole and verified when the table is opened, and it names the seals of the class
files: whatever changes later, no row can come from another class or another place. Shape letters: N rows, D width.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.kernels.codecs import CodecError, Floats, find_codec
from engram.quantize.class_map import ClassMap, refused
from engram.quantize.mapped import MappedTable, check_expected
from engram.quantize.mixed_file import CODEC, MapHeader, file_pieces, map_name, part_name, read_map, write_map
from engram.quantize.page_reader import Ints, Values
from engram.quantize.row_store import RowStoreError
from engram.quantize.row_table import VERIFY, Budget, MemoryRows, RowTable

_KEPT_BYTES = 8 << 20  # of scratch memory that a thread keeps
_BLOCK_BYTES = 4 << 20  # of decoded rows that `decoded_blocks` gives at a time


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one class has of a ticket."""

    number: int
    rows: int
    places: Ints | None  # None: all places of the request
    ticket: Any  # of the class's table; None where it is dropped


@dataclass(frozen=True, slots=True)
class _Ticket:
    rows: int
    shares: list[_Asked]
    stored: int  # bytes


class MixedTable(RowTable):
    """A table of several classes (FORMAT.md section 1.7): its class map in memory, a table file for each class."""

    what = "mixed table"
    codec_name = CODEC

    def __init__(
        self, path: Path, header: MapHeader, class_map: ClassMap, parts: dict[int, MappedTable], verify: str
    ) -> None:
        self.path, self.verify, self.class_map = path, verify, class_map
        self.header, self.rows, self.width, self.layer = header, header.rows, header.width, header.layer
        self.parts: dict[int, MappedTable] = parts  # by class; those that are dropped or have no rows are not there
        tables = list(parts.values())
        self.io = "+".join(dict.fromkeys(table.io for table in tables)) or "memory"
        self.why = "; ".join(dict.fromkeys(table.why for table in tables)) or "every row is dropped"
        self.pages = sum(table.pages for table in tables)
        self.held_bytes = class_map.records.nbytes
        self.file_bytes = sum(table.file_bytes for table in tables) + path.stat().st_size
        self.encoded_bytes = sum(table.encoded_bytes for table in tables)
        self._closed = False

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
    ) -> MixedTable:
        """Open a class map and its class files after checking all of them, and that it is the table expected.

        Raises RowStoreError for a map or a file that is missing, damaged or not the one that the map names, and as
        MappedTable.open does.
        """
        if verify not in VERIFY:
            raise RowStoreError(f"verify {verify!r} is not known", hint="use one of: " + ", ".join(VERIFY))
        if codec not in (None, CODEC):
            raise RowStoreError(f"table file {path} has codec {CODEC!r}, expected {codec!r}",
                                hint="it belongs to another layer or another package")  # fmt: skip
        header, class_map = read_map(path)
        check_expected(path, header, rows=rows, width=width, layer=layer)
        parts: dict[int, MappedTable] = {}
        try:
            for number, wanted in enumerate(header.classes):
                try:
                    if wanted.codec is not None:
                        find_codec(wanted.codec, wanted.codec_version)
                except CodecError as wrong:
                    raise refused(path, f"cannot be read: class {number}: {wrong}", wrong.hint) from None
                if not wanted.stored:
                    continue
                name = path.with_name(part_name(path.name, number))
                parts[number] = MappedTable.open(
                    name, codec=wanted.codec, rows=wanted.rows, width=header.width, layer=header.layer, verify=verify,
                    io=io,
                )  # fmt: skip
                if parts[number].seal() != wanted.seal:
                    raise RowStoreError(
                        f"table file {name} is whole, but not the one that the class map {path} describes as class "
                        f"{number}",
                        hint="it comes from another table: copy the package again",
                    )
            return cls(path, header, class_map, parts, verify)
        except BaseException:
            for table in parts.values():
                table.close()
            raise

    @property
    def paths(self) -> list[Path]:
        """The files of the classes, and the map."""
        return [*(table.path for table in self.parts.values()), self.path]

    @property
    def pages_read(self) -> int:
        return sum(table.pages_read for table in self.parts.values())

    def ask(self, rows: Ints) -> _Ticket:
        self._check_open()
        rows_N = np.ascontiguousarray(rows, dtype=np.int64).reshape(-1)
        if rows_N.size and int(rows_N.view(np.uint64).max()) >= self.rows:
            self._refuse_row(int(rows_N[int((rows_N.view(np.uint64) >= self.rows).argmax())]))
        shares, stored = [], 0
        for share in self.class_map.split(rows_N):
            table = self.parts.get(share.number)
            ticket = None if table is None else table.ask(share.ranks)
            shares.append(_Asked(share.number, len(share.ranks), share.places, ticket))
            stored += 0 if table is None else len(share.ranks) * table.row_bytes
        return _Ticket(len(rows_N), shares, stored)

    def take(self, ticket: _Ticket, out: Values, *, threads: int = 1) -> Values:
        self._check_open()
        out_ND = self._as_rows(out, ticket.rows)
        for share in ticket.shares:
            if (table := self.parts.get(share.number)) is not None:
                part = out_ND if share.places is None else _scratch.rows(share.rows, self.width, out_ND.dtype)
                table.take(share.ticket, part, threads=threads)
                _put(out_ND, share.places, part)
            else:
                _put(out_ND, share.places, None)
        return out

    def arrived(self, ticket: _Ticket) -> bool:
        return all(share.ticket is None or share.ticket.done for share in ticket.shares)

    def stored_bytes(self, ticket: _Ticket, rows: int) -> int:
        return ticket.stored

    def _as_rows(self, out: NDArray[Any], rows: int) -> NDArray[Any]:
        size = rows * self.width
        if out.dtype not in (np.float32, np.uint16) or out.size != size or not (
            out.flags.c_contiguous and out.flags.writeable
        ):
            raise RowStoreError(
                f"rows of mixed table {self.path} cannot be handed over: out must be {size} contiguous values of "
                f"float32 or uint16, found {out.dtype} {list(out.shape)}"
            )
        return out.reshape(rows, self.width)

    def check_ids(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.rows:
            self._refuse_row(lowest if lowest < 0 else highest)

    def _refuse_row(self, row: int) -> NoReturn:
        raise RowStoreError(
            f"row {row} is outside the table of layer {self.layer} in {self.path}, which has {self.rows} rows",
            hint="the rows were hashed with another layout than the table's",
        )

    def decoded_blocks(self, out: Floats | None = None) -> Iterator[tuple[int, Floats]]:
        self._check_open()
        streams = {number: _Stream(table.decoded_blocks()) for number, table in self.parts.items()}
        count = max(1, _BLOCK_BYTES // (4 * self.width))
        for begin in range(0, self.rows, count):
            end = min(begin + count, self.rows)
            block = np.empty((end - begin, self.width), dtype=np.float32) if out is None else out[begin:end]
            class_n = self.class_map.classes(begin, end)
            for number in np.flatnonzero(np.bincount(class_n)).tolist():
                here = np.flatnonzero(class_n == number)
                block[here] = streams[number].take(len(here)) if number in streams else 0
            yield begin, block

    def in_memory(self, advance: Callable[[int], None]) -> MemoryRows:
        held = {number: table.in_memory(advance) for number, table in self.parts.items()}
        advance(self.rows - sum(table.rows for table in self.parts.values()))
        return _MixedRows(self.class_map, held, self.width)

    def copy(self, folder: Path, progress: Progress) -> dict[str, Any]:
        self._check_open()
        name, made = map_name(self.layer), {}
        with progress.task(f"layer {self.layer}", self.rows, "rows") as task:
            for number, table in self.parts.items():
                made[number] = table.copy_rows(folder / part_name(name, number), task.advance)
                if made[number].seal != self.header.classes[number].seal:
                    raise RowStoreError(f"table file {table.path} was overwritten while it was copied")
        codecs = [None if c.codec is None else (c.codec, c.codec_version or 0) for c in self.header.classes]
        return write_map(folder, self.width, self.layer, self.class_map, codecs, made)

    def part_entries(self) -> list[dict[str, Any]]:
        found = []
        for n, c in enumerate(self.header.classes):
            file = part_name(self.path.name, n) if c.stored else None
            found.append({"class": n, **c._asdict(), "file": file, "bytes": self.parts[n].file_bytes if file else 0})
        return found

    def seal(self) -> str:
        """SHA-256 of the class map, which names the seals of the class files."""
        digest = hashlib.sha256()
        for piece in file_pieces(self.header, self.class_map):
            digest.update(piece)
        return digest.hexdigest()

    def verify_all(self) -> None:
        self._check_open()
        for table in self.parts.values():
            table.verify_all()

    def set_budget(self, budget: Budget | None) -> None:
        for table in self.parts.values():
            table.set_budget(budget)

    def trim(self) -> None:
        for table in self.parts.values():
            table.trim()

    def close(self) -> None:
        self._closed = True
        for table in self.parts.values():
            table.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RowStoreError(f"mixed table {self.path} (layer {self.layer}) is closed")


class _Scratch(threading.local):
    """Memory of each thread for the rows of one class: fresh pages at every call would take longer than decoding."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)

    def rows(self, count: int, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """[count, width], undefined, until the next call."""
        size = count * width * dtype.itemsize
        if size > _KEPT_BYTES:
            return np.empty((count, width), dtype=dtype)
        if size > self._bytes.size:
            self._bytes = np.empty(size, dtype=np.uint8)
        return self._bytes[:size].view(dtype).reshape(count, width)


_scratch = _Scratch()


def _put(out_ND: NDArray[Any], places: Ints | None, part: NDArray[Any] | None) -> None:
    """What one class has of a request goes to its places of `out`: `part`, or zeros for a class that is dropped."""
    if part is None:
        out_ND[slice(None) if places is None else places] = 0
    elif places is not None:
        out_ND[places] = part


class _MixedRows:
    """All rows in memory, class by class."""

    def __init__(self, class_map: ClassMap, held: Mapping[int, MemoryRows], width: int) -> None:
        self._map, self._held, self._width = class_map, held, width
        self.nbytes = sum(rows.nbytes for rows in held.values())

    def gather(self, rows: Ints, out: Values, *, threads: int = 1) -> int:
        """As MemoryRows says."""
        rows_N, out_ND, stored = rows.reshape(-1), out.reshape(rows.size, self._width), 0
        for share in self._map.split(rows_N):
            if (held := self._held.get(share.number)) is not None:
                part = out_ND
                if share.places is not None:
                    part = _scratch.rows(len(share.ranks), self._width, out_ND.dtype)
                stored += held.gather(share.ranks[:, None], part, threads=threads)
                _put(out_ND, share.places, part)
            else:
                _put(out_ND, share.places, None)
        return stored


class _Stream:
    """Blocks of rows, taken in other numbers than they come."""

    def __init__(self, blocks: Iterator[tuple[int, Floats]]) -> None:
        self._blocks, self._left = blocks, np.empty((0, 0), dtype=np.float32)

    def take(self, count: int) -> Floats:
        """The next rows."""
        parts = []
        while count:
            if not len(self._left):
                self._left = next(self._blocks)[1]
            parts.append(self._left[:count])
            self._left = self._left[count:]
            count -= len(parts[-1])
        return np.concatenate(parts)
