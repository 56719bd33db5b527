"""Rows wanted → rows in memory: dedupe, ask ahead, wait late. The seam's storage side; numpy only.

Shape letters: B batch, T positions, C columns, D width of a row, E = C * D, U distinct rows.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders.process_memory import available_bytes, mapped_resident_bytes
from engram.kernels.codecs import Bytes, Floats
from engram.quantize.mapped import Budget, MappedTable

Ints = NDArray[np.int64]

PLACEMENTS = ("none", "ram", "disk")  # none: nothing is offloaded, rows lie decoded in memory
COUNTERS = ("rows_asked", "rows_read", "bytes_read", "pages_touched")


class ReaderError(EngramError):
    """Rows that cannot be read: a placement that is not known or does not fit, a layer that was not asked for."""


class HasTables(Protocol):
    """What a reader needs of a package."""

    @property
    def layers(self) -> Mapping[int, MappedTable]:
        """Mapped tables, by layer."""


@dataclass(frozen=True)
class _Wanted:
    """One layer's part of a ticket."""

    shape: tuple[int, int, int]
    rows_U: Ints  # ascending
    inverse: Ints  # where in rows_U the row of each place is
    asked: Future[None] | None


@dataclass(frozen=True)
class Ticket:
    """Rows that were asked for, by layer. May be taken from any number of times."""

    wanted: Mapping[int, _Wanted]


class RowReader:
    """Delivers `memory_BTE` from a package's tables, in one of three placements that give the same bits.

    `none` holds decoded float32 rows in memory, `ram` the encoded rows, `disk` maps the files and keeps at most
    `cache_bytes` of them resident (None: as the kernel likes). Several threads may use one reader.
    """

    def __init__(
        self,
        package: HasTables,
        placement: str = "disk",
        *,
        cache_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ReaderError for an unknown placement or one that does not fit in memory, RowStoreError for damage."""
        if placement not in PLACEMENTS:
            raise ReaderError(f"placement {placement!r} is not known", hint="use one of: " + ", ".join(PLACEMENTS))
        self.placement, self.tables = placement, dict(package.layers)
        self.table_bytes = sum(table.geometry.file_bytes for table in self.tables.values())
        self.budget = Budget(cache_bytes) if placement == "disk" and cache_bytes is not None else None
        self._float: dict[int, Floats] = {}
        self._encoded: dict[int, Bytes] = {}
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._pool: ThreadPoolExecutor | None = None
        if placement == "disk":
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="engram-read-ahead")
            for table in self.tables.values():
                if self.budget is not None:
                    self.budget.adopt(table)
        else:
            self._load(progress or Progress())

    def _load(self, progress: Progress) -> None:
        """Read all tables into memory, every page verified."""
        row_bytes = {n: 4 * t.width if self.placement == "none" else t.row_bytes for n, t in self.tables.items()}
        needed = sum(table.rows * row_bytes[n] for n, table in self.tables.items())
        room = available_bytes()
        if room is not None and needed > room:
            raise self._too_large(needed, f"{room:,} are available")
        try:
            for n, table in self.tables.items():
                if self.placement == "none":
                    self._float[n] = np.empty((table.rows, table.width), dtype=np.float32)
                else:
                    self._encoded[n] = np.empty((table.rows, table.row_bytes), dtype=np.uint8)
        except MemoryError:
            raise self._too_large(needed, "the system refuses them") from None
        for n, table in self.tables.items():
            with progress.task(f"layer {n} into memory", table.rows, "rows") as task:
                for first, block in table.blocks():
                    if self.placement == "none":
                        table.codec.decode(block, table.width, out=self._float[n][first : first + len(block)])
                    else:
                        self._encoded[n][first : first + len(block)] = block
                    task.advance(len(block))

    def _too_large(self, needed: int, why: str) -> ReaderError:
        return ReaderError(
            f"placement {self.placement!r} needs {needed:,} bytes for the tables, {why}",
            hint="use --offload disk" if self.placement == "ram" else "use --offload disk or ram",
        )

    def ask(self, rows: Mapping[int, Ints]) -> Ticket:
        """Want rows, by layer int64 [B, T, C]; returns at once while the disk is asked for them in the background.

        Raises RowStoreError for a row outside its table, ReaderError for a layer without one.
        """
        wanted = {}
        for layer, rows_BTC in rows.items():
            table = self._table(layer)
            if rows_BTC.ndim != 3:
                raise ReaderError(f"rows of layer {layer} have shape {list(rows_BTC.shape)}, expected [B, T, C]")
            rows_U, inverse = np.unique(rows_BTC.astype(np.int64, copy=False).ravel(), return_inverse=True)
            pages = 0
            asked = None
            if len(rows_U):
                table.check_ids(int(rows_U[0]), int(rows_U[-1]))
                if self._pool is not None:
                    page_U = rows_U // table.rows_per_page
                    distinct = page_U[np.flatnonzero(np.diff(page_U, prepend=-1))]
                    pages = len(distinct)
                    fresh = table.claim(distinct)
                    asked = self._pool.submit(table.read_ahead, fresh) if fresh.size else None
            b, t, c = rows_BTC.shape
            wanted[layer] = _Wanted((b, t, c), rows_U, inverse, asked)
            self._count(rows_asked=rows_BTC.size, pages_touched=pages)
        return Ticket(wanted)

    def take(self, ticket: Ticket, layer: int, out: Floats | None = None) -> Floats:
        """Wait for a layer's rows: `memory_BTE`, float32 [B, T, C * D], written into `out` where given.

        Raises RowStoreError where a page is damaged, ReaderError for a layer that the ticket does not hold.
        """
        table = self._table(layer)
        if layer not in ticket.wanted:
            raise ReaderError(f"rows of layer {layer} were not asked for, only of {sorted(ticket.wanted)}")
        wanted = ticket.wanted[layer]
        b, t, c = wanted.shape
        if out is None:
            out = np.empty((b, t, c * table.width), dtype=np.float32)
        if out.shape != (b, t, c * table.width) or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ReaderError(f"out must be contiguous float32 {[b, t, c * table.width]}, found {list(out.shape)}")
        if not wanted.rows_U.size:
            return out
        if wanted.asked is not None:
            wanted.asked.result()
        rows_UD = self._rows(table, layer, wanted.rows_U)
        flat = out.reshape(-1, table.width)
        np.take(rows_UD, wanted.inverse, axis=0, out=flat, mode="clip")  # "raise" would copy through a buffer
        stored = 4 * table.width if self.placement == "none" else table.row_bytes
        self._count(rows_read=len(wanted.rows_U), bytes_read=len(wanted.rows_U) * stored)
        return out

    def _rows(self, table: MappedTable, layer: int, rows_U: Ints) -> Floats:
        if self.placement == "none":
            return np.take(self._float[layer], rows_U, axis=0)
        if self.placement == "ram":
            return table.codec.decode(np.take(self._encoded[layer], rows_U, axis=0), table.width)
        return table.codec.decode(table.gather(rows_U), table.width)

    def _table(self, layer: int) -> MappedTable:
        if layer not in self.tables:
            raise ReaderError(f"layer {layer} has no table, the package has layers {sorted(self.tables)}")
        return self.tables[layer]

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number

    def counters(self) -> dict[str, int]:
        """Rows asked for, distinct rows read, their bytes as stored in this placement, pages of files they lie on."""
        with self._lock:
            return dict(self._counts)

    def resident_bytes(self) -> int | None:
        """Bytes of the tables that are in this process's memory now; None where the system does not tell."""
        if self.placement == "disk":
            return mapped_resident_bytes(table.path for table in self.tables.values())
        return sum(a.nbytes for a in self._float.values()) + sum(a.nbytes for a in self._encoded.values())

    def close(self) -> None:
        """End the background thread, unmap the tables and let go of rows in memory."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for table in self.tables.values():
            table.close()
        self._float.clear()
        self._encoded.clear()
