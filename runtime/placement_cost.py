"""What rows cost from a disk and from memory: the arithmetic of `engram plan`, and short measurements of both.

The model. A token reads columns x layers rows, all asked for at once. Cold, each is a read of its own of a 4 KiB page;
no row of our table files crosses a page. Rows that stay in foreign safetensors may: a row of K bytes that begins at any
multiple of 8 (or of the largest power of two in K, below that) lies on 1 + (K - 8) / 4096 pages, and one whose scales
are a tensor of their own is two reads (DeepSeek-V4.1: 256 + 8 bytes). n pages asked for at once take one read's latency
and (n - 1) / reads a second. A page that is new to a process, cached or not, also costs its fault and its checksum
(TOUCH_S), while others still arrive, and each table's asking for new pages ASK_S; both were measured on this project's
machine. LOG.md compares all this with real reads.

A prompt reads each row once. Of the look-ups of a prompt of 1,000 tokens this share is distinct rows, by order: at most
that of windows of 1,000 tokens (43, 75, 86, 91, 94 % for orders 1 to 5), at least that of 1.5 M tokens of documentation
in one go, as after long use (15.4, 37.4, 53.2 % for orders 2 to 4); both measured, LOG.md. Warm (all pages cached and
touched before), every look-up is decoded: a gather's call and row costs, fitted to the one-thread figures of
benchmarks/results/rows_kernels.json within a factor of 1.6 (int8-row at width 256: 75 ns a row measured, 100 here), or
measured per codec.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram import EngramError
from engram.kernels import dispatch
from engram.kernels.codecs import Codec
from engram.quantize.row_store import PAGE
from engram.runtime.bench_kernels import random_block, tiled

PROMPT = 1000  # tokens
USUAL_LATENCY_S = 80e-6  # of one 4 KiB read of an NVMe disk, where only reads a second are told
MEASURED_HERE = {1: 16_220.0, 8: 53_810.0, 32: 78_786.0}  # benchmarks/results/rows_disk.json: reads a second by depth
DISTINCT_LEAST = {1: 0.04, 2: 0.154, 3: 0.374, 4: 0.532}
DISTINCT_MOST = {1: 0.43, 2: 0.75, 3: 0.86, 4: 0.91, 5: 0.94}
MAPPED = 2.0  # times a row from memory takes from a map of cached pages: 1.3 to 2.1 measured, LOG.md and rows_disk.json
READER_S = 6e-6  # that asking for a table's rows and taking them costs beside the gather
ASK_S = 20e-6  # that a table's ask costs which finds new pages
TOUCH_S, TOUCH_MANY_S = 4e-6, 2e-6  # of a page that is new to the process: among a token's, among a prompt's
_CALL_S, _ROW_S, _VALUE_S, _BYTE_S = 8e-6, 10e-9, 0.2e-9, 0.15e-9
_TABLE_BYTES, _BLOCK_ROWS, _BULK_ROWS = 256 << 20, 512, 8192


class PlacementError(EngramError):
    """A disk, memory or context that a plan cannot be made for."""


@dataclass(frozen=True)
class Disk:
    """A disk: random 4 KiB reads a second with many under way, and how long one alone takes."""

    iops: float
    latency_s: float
    source: str  # "given", "measured" or "default"
    words: str
    reads_per_second: Mapping[int, float] = field(default_factory=dict)  # by queue depth, where that is known

    @classmethod
    def given(cls, iops: float) -> Disk:
        """Of reads a second alone. Raises PlacementError for what is no rate."""
        if not (math.isfinite(iops) and iops > 0):
            raise PlacementError(
                f"--disk-iops {iops:g} must be above 0", hint="random 4 KiB reads a second; engram doctor measures them"
            )
        latency = max(USUAL_LATENCY_S, 1 / iops)
        return cls(iops, latency, "given", f"{iops:,.0f} reads a second as told, {1e3 * latency:.2f} ms for one alone")

    @classmethod
    def of_curve(cls, rates: Mapping[int, float], source: str, words: str) -> Disk:
        """Of reads a second by queue depth, the least of which is 1. A disk is as fast as its best depth."""
        best = max(rates.values())
        if not (math.isfinite(best) and min(rates.values()) > 0):
            raise PlacementError(f"the probe of the disk found {dict(rates)} reads a second, they must be above 0")
        words += f": {best:,.0f} reads a second, {1e3 / rates[min(rates)]:.2f} ms for one alone"
        return cls(best, 1 / rates[min(rates)], source, words, dict(rates))

    def seconds(self, pages: float, touch_s: float) -> float:
        """For so many pages asked for at once, each of which takes so long to touch when it is there."""
        return self.latency_s * min(1.0, pages) + max((pages - 1) / self.iops, pages * touch_s)


@dataclass(frozen=True)
class StoredTable:
    """One layer's rows as they lie on the disk."""

    layer: int
    orders: tuple[int, ...]
    heads: int
    width: int
    codec: str
    row_bytes: float
    file_bytes: int
    rows_pages: int  # that hold rows
    parts: tuple[float, ...] = ()  # bytes of a row's parts where rows may cross pages; empty where they do not

    @property
    def columns(self) -> int:
        """Rows that a token reads."""
        return len(self.orders) * self.heads

    @property
    def reads_per_row(self) -> float:
        return max(1, len(self.parts)) / self.together

    @property
    def together(self) -> int:
        """Rows that lie side by side and are read as one: all heads of an id, where there is no hash."""
        return self.heads if self.orders == (1,) else 1

    def distinct_pages(self, rows: float) -> float:
        """Pages that so many evenly drawn rows lie on, as expected: never more than there are."""
        runs = rows / self.together
        if not self.parts:
            spanned = 1.0 if self.together == 1 else pages_of(self.together * self.row_bytes)
            return _occupied(runs * spanned, self.rows_pages)
        return sum(
            _occupied(runs * pages_of(self.together * size), max(1.0, self.rows_pages * size / self.row_bytes))
            for size in self.parts
        )

    def distinct_rows(self, shares: Mapping[int, float], beyond: float) -> float:
        """Of the look-ups of a prompt, by each order's share; `beyond` is that of orders that are not told."""
        return PROMPT * self.heads * sum(shares.get(order, beyond) for order in self.orders)


def pages_of(size: float) -> float:
    """Pages that so many bytes lie on, on the average over all places where they may begin."""
    return 1 + (size - math.gcd(round(size), 8)) / PAGE


def _occupied(draws: float, pages: float) -> float:
    """How many of so many pages are hit by so many even draws, as expected."""
    return min(draws, pages if pages <= 1 else -pages * math.expm1(draws * math.log1p(-1 / pages)))


@dataclass(frozen=True)
class Gather:
    """How fast cached rows are gathered and decoded: (seconds a call, seconds a row) by codec."""

    source: str
    words: str
    by_codec: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, table: StoredTable, rows: float) -> float:
        """For one call that wants so many rows."""
        fitted = _CALL_S, _ROW_S + _VALUE_S * table.width + _BYTE_S * table.row_bytes
        found = [self.by_codec[name] for name in table.codec.split("+") if name in self.by_codec]  # of a mixed table
        call, row = (max(part) for part in zip(*found, strict=True)) if found else fitted
        return float(call + rows * row)


def cost(tables: Sequence[StoredTable], disk: Disk, gather: Gather) -> dict[str, Any]:
    """Reads, distinct pages and milliseconds of a token and of 1,000 prompt tokens; a prompt's as [least, most].

    `cold`: no page is cached; `cached`: all are, none of them touched by this process yet; `warm`: all were touched.
    """
    warm = sum(gather.seconds(table, table.columns) for table in tables)
    ask = len(tables) * ASK_S
    warm_prompt = sum(gather.seconds(table, PROMPT * table.columns) for table in tables)
    pages = sum(table.distinct_pages(table.columns) for table in tables)
    reads_prompt, pages_prompt = [], []
    for shares, beyond in ((DISTINCT_LEAST, DISTINCT_LEAST[4]), (DISTINCT_MOST, 1.0)):
        rows = [table.distinct_rows(shares, beyond) for table in tables]
        reads_prompt.append(sum(n * table.reads_per_row for n, table in zip(rows, tables, strict=True)))
        pages_prompt.append(sum(table.distinct_pages(n) for n, table in zip(rows, tables, strict=True)))
    return {
        "reads_per_token": sum(table.columns * table.reads_per_row for table in tables), "pages_per_token": pages,
        "bytes_per_token": sum(table.columns * table.row_bytes for table in tables),
        "cold_ms_per_token": 1e3 * (ask + disk.seconds(pages, TOUCH_S) + warm),
        "cached_ms_per_token": 1e3 * (ask + pages * TOUCH_S + warm), "warm_ms_per_token": 1e3 * warm,
        "reads_per_1000": reads_prompt, "pages_per_1000": pages_prompt,
        "cold_ms_per_1000": [1e3 * (ask + disk.seconds(n, TOUCH_MANY_S) + warm_prompt) for n in pages_prompt],
        "cached_ms_per_1000": [1e3 * (ask + n * TOUCH_MANY_S + warm_prompt) for n in pages_prompt],
        "warm_ms_per_1000": 1e3 * warm_prompt,
    }  # fmt: skip


def measure_gather(wanted: Iterable[tuple[Codec, int, int]], seconds: float = 1.0) -> Gather:
    """Time gathers of rows of each (codec, width, columns) from memory, for so long in all."""
    wanted = list({codec.name: (codec, width, columns) for codec, width, columns in wanted}.values())
    turn = seconds / max(1, 2 * len(wanted))
    found = {}
    for codec, width, columns in wanted:
        block = codec.encode(random_block(width, rows=_BLOCK_ROWS))
        table = tiled(block, max(_BULK_ROWS, _TABLE_BYTES // block.shape[1]))
        few, many = _median(codec, table, width, columns, turn), _median(codec, table, width, _BULK_ROWS, turn)
        row = many / _BULK_ROWS
        found[codec.name] = READER_S + max(0.0, few - columns * row), MAPPED * row
    return Gather("measured", f"gathers timed here from memory, rows times {MAPPED:g} for a map", found)


def _median(codec: Codec, table_NK: Any, width: int, rows: int, seconds: float) -> float:
    """Seconds a call, over calls for so long; the first one does not count."""
    out = np.zeros((rows, width), dtype=np.float32)
    draw = np.random.default_rng(0)
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while len(spent) < 4 or time.perf_counter() < end:
        ids = draw.integers(0, len(table_NK), size=(rows, 1))
        begin = time.perf_counter()
        dispatch.ops().gather(codec, table_NK, ids, out, width=width, threads=1)
        spent.append(time.perf_counter() - begin)
    return float(np.median(spent[1:]))
