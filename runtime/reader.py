"""Rows wanted → rows in memory: ask for all layers at once, wait late, decode in place. The seam's storage side.

Shape letters: B batch, T positions, C columns, D width of a row, E = C * D, N = B * T * C rows of one layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders.process_memory import available_bytes, mapped_resident_bytes
from engram.kernels import dispatch
from engram.kernels.codecs import find_codec
from engram.kernels.reference import aligned_empty
from engram.quantize.row_table import Budget, MemoryRows, OneCodecRows, RowTable
from engram.runtime.hot_rows import HotRows, Split

Ints = NDArray[np.int64]
Memory = NDArray[Any]  # float32, or uint16 that holds the bits of bf16

PLACEMENTS = ("none", "ram", "disk")  # none: nothing is offloaded, rows lie decoded in memory
COUNTERS = ("rows_asked", "rows_read", "rows_hot", "bytes_read", "pages_read")


class ReaderError(EngramError):
    """Rows that cannot be read: a placement that is not known or does not fit, a layer that was not asked for."""


class HasTables(Protocol):
    """What a reader needs of a package."""

    @property
    def layers(self) -> Mapping[int, RowTable]:
        """Mapped tables, by layer."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One layer's part of a ticket."""

    rows_BTC: Ints
    asked: Any = None  # the table's own ticket, where rows come from the disk
    split: Split | None = None  # where some of them come from the hot rows instead


class Ticket:
    """Rows that were asked for, by layer. May be taken from any number of times."""

    __slots__ = ("wanted",)

    def __init__(self, wanted: dict[int, _Wanted]) -> None:
        self.wanted = wanted


class RowReader:
    """Delivers `memory_BTE` from a package's tables, in one of three placements that give the same bits.

    `none` holds decoded float32 rows in memory, `ram` the encoded rows, `disk` maps the files and keeps at most
    `cache_bytes` of them resident (None: as the kernel likes). `hot` are rows of the disk's tables that are in memory
    already, by layer: they stand in for a page that nobody asked for yet. Several threads may use one reader.
    """

    def __init__(
        self,
        package: HasTables,
        placement: str = "disk",
        *,
        cache_bytes: int | None = None,
        hot: Mapping[int, HotRows] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Raises ReaderError for an unknown placement or one that does not fit in memory, RowStoreError for damage."""
        if placement not in PLACEMENTS:
            raise ReaderError(f"placement {placement!r} is not known", hint="use one of: " + ", ".join(PLACEMENTS))
        self.placement, self.tables = placement, dict(package.layers)
        self.table_bytes = sum(table.file_bytes for table in self.tables.values())
        self.hot = dict(hot or {}) if placement == "disk" else {}
        self.budget: Budget | None = None
        if placement == "disk" and cache_bytes is not None:
            self.budget = Budget(max(0, cache_bytes - sum(rows.bytes_UK.nbytes for rows in self.hot.values())))
        self._held: dict[int, MemoryRows] = {}  # tables in memory
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0)
        if placement != "disk":
            self._load(progress or Progress())
        elif self.budget is not None:
            for table in self.tables.values():
                self.budget.adopt(table)

    @property
    def row_io(self) -> str:
        """How rows are read: the tables' way (mmap, uring, pread, numpy), or "memory"."""
        ways = {table.io: None for table in self.tables.values()} if self.placement == "disk" else {"memory": None}
        return "+".join(ways)

    def _load(self, progress: Progress) -> None:
        """Read all tables into memory, every page verified."""
        decoded = self.placement == "none"
        needed = sum(4 * t.rows * t.width if decoded else t.encoded_bytes for t in self.tables.values())
        room = available_bytes()
        if room is not None and needed > room:
            raise self._too_large(needed, f"{room:,} are available")
        try:
            for n, table in self.tables.items():
                with progress.task(f"layer {n} into memory", table.rows, "rows") as task:
                    self._held[n] = _decoded(table, task.advance) if decoded else table.in_memory(task.advance)
        except MemoryError:
            raise self._too_large(needed, "the system refuses them") from None

    def _too_large(self, needed: int, why: str) -> ReaderError:
        return ReaderError(
            f"placement {self.placement!r} needs {needed:,} bytes for the tables, {why}",
            hint="use --offload disk" if self.placement == "ram" else "use --offload disk or ram",
        )

    def ask(self, rows: Mapping[int, Ints]) -> Ticket:
        """Want rows, by layer int64 [B, T, C]; returns at once while the disk is asked for them in the background.

        Ask for all layers, and for all tokens that may come, in one call. The arrays must not change before the rows
        were taken. Raises RowStoreError for a row outside its table, ReaderError for a layer without one.
        """
        wanted = {}
        asked = 0
        for layer, rows_BTC in rows.items():
            table = self._table(layer)
            if rows_BTC.ndim != 3:
                raise ReaderError(f"rows of layer {layer} have shape {list(rows_BTC.shape)}, expected [B, T, C]")
            rows_BTC = np.ascontiguousarray(rows_BTC, dtype=np.int64)
            wanted[layer] = self._ask_layer(layer, table, rows_BTC) if rows_BTC.size else _Wanted(rows_BTC)
            asked += rows_BTC.size
        with self._lock:
            self._counts["rows_asked"] += asked
        return Ticket(wanted)

    def _ask_layer(self, layer: int, table: RowTable, rows_BTC: Ints) -> _Wanted:
        if self.placement != "disk":
            _check_ids(table, rows_BTC)
            return _Wanted(rows_BTC)
        if (hot := self.hot.get(layer)) is not None:
            rows_N = rows_BTC.reshape(-1)
            _check_ids(table, rows_N)
            split = hot.split(rows_N)
            if split is not None:
                return _Wanted(rows_BTC, table.ask(rows_N[split.cold_N]), split)
        return _Wanted(rows_BTC, table.ask(rows_BTC))

    def take(self, ticket: Ticket, layer: int, out: Memory | None = None) -> Memory:
        """Wait for a layer's rows: `memory_BTE` [B, T, C * D], decoded into `out` where given.

        `out` is float32, or uint16 for the bits of bf16 (rounded to nearest even). Without `out` every call returns
        memory of its own, which the caller may keep: a decode step's is small enough that the allocator hands out the
        same block again. Raises RowStoreError where a page is damaged, ReaderError for a layer that was not asked for.
        """
        table = self._table(layer)
        if layer not in ticket.wanted:
            raise ReaderError(f"rows of layer {layer} were not asked for, only of {sorted(ticket.wanted)}")
        wanted = ticket.wanted[layer]
        b, t, c = wanted.rows_BTC.shape
        if out is None:
            out = aligned_empty((b, t, c * table.width), np.float32)
        elif (out.shape != (b, t, c * table.width) or out.dtype not in (np.float32, np.uint16)
              or not out.flags.c_contiguous):  # fmt: skip
            raise ReaderError(
                f"out must be contiguous float32 (or uint16) {[b, t, c * table.width]}, found {out.dtype} "
                f"{list(out.shape)}"
            )
        rows = wanted.rows_BTC.size
        if not rows:
            return out
        served = 0
        if self.placement != "disk":
            stored = self._held[layer].gather(wanted.rows_BTC, out, threads=0)
        else:
            if wanted.split is None:
                table.take(wanted.asked, out, threads=0)
            else:
                served = len(wanted.split.hot_N)
                self._take_split(layer, table, wanted, wanted.split, out.reshape(-1, table.width))
            stored = table.stored_bytes(wanted.asked, rows - served)
        with self._lock:
            self._counts["rows_read"] += rows - served
            self._counts["rows_hot"] += served
            self._counts["bytes_read"] += stored
        return out

    def arrived(self, ticket: Ticket, layer: int) -> bool:
        """Whether `take` has nothing to wait for: these rows lie in memory, or their pages were read before."""
        wanted = ticket.wanted[layer]
        if self.placement != "disk":
            return True
        return wanted.split is None and self._table(layer).arrived(wanted.asked)

    def _take_split(self, layer: int, table: RowTable, wanted: _Wanted, split: Split, out_ND: Memory) -> None:
        """Some rows from the hot rows, the others from the table."""
        hot = self.hot[layer]
        part = np.empty((len(split.hot_N), table.width), dtype=out_ND.dtype)
        out_ND[split.hot_N] = dispatch.ops().gather(
            hot.codec, hot.bytes_UK, split.kept_N[:, None], part, width=table.width, threads=0
        )
        if split.cold_N.size:
            part = np.empty((len(split.cold_N), table.width), dtype=out_ND.dtype)
            table.take(wanted.asked, part, threads=0)
            out_ND[split.cold_N] = part

    def _table(self, layer: int) -> RowTable:
        if layer not in self.tables:
            raise ReaderError(f"layer {layer} has no table, the package has layers {sorted(self.tables)}")
        return self.tables[layer]

    def counters(self) -> dict[str, int]:
        """Rows asked for; rows decoded from the tables, their stored bytes; rows that the hot rows served; pages.

        `pages_read` counts the distinct 4 KiB pages that the device was asked for (0 where tables lie in memory).
        """
        with self._lock:
            counts = dict(self._counts)
        if self.placement == "disk":
            counts["pages_read"] = sum(table.pages_read for table in self.tables.values())
        return counts

    def resident_bytes(self) -> int | None:
        """Bytes of the tables that are in this process's memory now; None where the system does not tell."""
        held = sum(table.held_bytes for table in self.tables.values())
        if self.placement == "disk":
            mapped = mapped_resident_bytes(path for table in self.tables.values() for path in table.paths)
            return None if mapped is None else held + mapped + sum(hot.bytes_UK.nbytes for hot in self.hot.values())
        return held + sum(rows.nbytes for rows in self._held.values())

    def close(self) -> None:
        """Unmap the tables and let go of rows in memory."""
        for table in self.tables.values():
            table.close()
        self._held.clear()
        self.hot.clear()


def _decoded(table: RowTable, advance: Callable[[int], None]) -> OneCodecRows:
    """All rows of a table as float32 in memory."""
    rows_ND = np.empty((table.rows, table.width), dtype=np.float32)
    for _, block in table.decoded_blocks(rows_ND):
        advance(len(block))
    return OneCodecRows(find_codec("f32"), rows_ND.view(np.uint8), table.width)


def _check_ids(table: RowTable, rows: Ints) -> None:
    """RowStoreError for a row outside the table; seen as unsigned, negative ids are the largest."""
    if int(rows.view(np.uint64).max()) >= table.rows:
        table.check_ids(int(rows.min()), int(rows.max()))
