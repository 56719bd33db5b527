"""Contenders for rows of a table file: ours with each back end, NumPy on a map, and EngramDB where it is installed.

An opener opens its file anew for every measurement, because what is mapped cannot be made cold. Shape letters: N rows,
K bytes a row, R rows of a call.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.kernels.codecs import Bytes
from engram.kernels.reference import aligned_empty
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import PAGE
from engram.runtime.bench_race import BenchError, Contender, Ints

_COPY_BYTES = 8 << 20
_SHARDS = 8
_SLOW_ROWS = 16_384  # larger calls of peers that make Python objects take seconds


@dataclass(frozen=True)
class Opener:
    """A way to read rows: `open()` yields the contender, and closes every file when the block ends."""

    name: str
    open: Callable[[], AbstractContextManager[Contender]]
    files: tuple[Path, ...]  # made cold before a cold measurement


@dataclass(frozen=True)
class Place:
    """Where the rows of a packed table file lie."""

    path: Path
    begin: int  # of the first page
    pages: int
    rows: int
    row_bytes: int
    rows_per_page: int

    @classmethod
    def of(cls, table: MappedTable) -> Place:
        """Of an open table."""
        begin = len(table.geometry.header)
        return cls(table.path, begin, table.pages, table.rows, table.row_bytes, table.rows_per_page)

    @property
    def tight(self) -> bool:
        """Whether the rows of all pages lie one after another, so that row i begins at i * K."""
        return PAGE % self.row_bytes == 0

    def starts(self, ids: Ints) -> Ints:
        """Where rows begin in the file."""
        pages = ids // self.rows_per_page
        found: Ints = self.begin + pages * PAGE + (ids - pages * self.rows_per_page) * self.row_bytes
        return found

    def read(self, ids: Ints) -> Bytes:
        """The reference: one plain read a row, uint8 [R, K]."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            found = [os.pread(handle, self.row_bytes, at) for at in self.starts(ids).tolist()]
        finally:
            os.close(handle)
        return np.frombuffer(b"".join(found), np.uint8).reshape(len(ids), self.row_bytes)


def our_openers(
    place: Place, *, backends: tuple[str, ...], most_rows: int, verify: str = "first-touch", threads: int = 1
) -> list[Opener]:
    """Our mapped table: stored bytes and decoded rows, by each of the back ends ("auto" is what a reader takes)."""
    found = []
    for io in backends:
        words = "engram" if io == "auto" else f"engram {io}"
        words += "" if verify == "first-touch" else f", verify {verify}"
        for kind in ("raw", "decoded"):
            name = f"{words}, stored bytes" if kind == "raw" else words
            found.append(Opener(name, _our_open(place, io, kind, most_rows, verify, threads, name), (place.path,)))
    return found


def _our_open(
    place: Place, io: str, kind: str, most_rows: int, verify: str, threads: int, name: str
) -> Callable[[], AbstractContextManager[Contender]]:
    @contextlib.contextmanager
    def opened() -> Iterator[Contender]:
        with MappedTable.open(place.path, verify=verify, io=io) as table:
            if kind == "raw":
                raw = np.zeros((most_rows, place.row_bytes), dtype=np.uint8)

                def call(ids: Ints) -> NDArray[Any]:
                    return table.gather(ids, raw[: len(ids)], threads=threads)

                yield Contender(name, call, place.read, kind="raw", maps=True, most_rows=most_rows)
            else:
                out = aligned_empty((most_rows, table.width), np.float32)
                out.fill(0)
                codec, width = table.codec, table.width

                def decoded(ids: Ints) -> NDArray[Any]:
                    return table.decode(ids, out[: len(ids)], threads=threads)

                yield Contender(name, decoded, lambda ids: codec.decode(place.read(ids), width), maps=True,
                                 most_rows=most_rows)  # fmt: skip

    return opened


def numpy_openers(place: Place, *, most_rows: int) -> list[Opener]:
    """NumPy on a map with random advice: plain indexing of a memmap, and take into a buffer where rows fill pages.

    Elsewhere the rows are items that overlap, of which np.take would copy the whole table first.
    """

    def rows_of(area: NDArray[Any]) -> tuple[NDArray[Any], Callable[[Ints], Ints]]:
        """Something to index rows in, and what a row's index is."""
        if place.tight:
            return area.reshape(-1, place.row_bytes), lambda ids: ids
        unit = int(np.gcd(PAGE, place.row_bytes))
        count = (area.size - place.row_bytes) // unit + 1
        items = np.ndarray((count,), f"V{place.row_bytes}", area.data, strides=(unit,))
        return items, lambda ids: (place.starts(ids) - place.begin) // unit

    @contextlib.contextmanager
    def mapped() -> Iterator[NDArray[np.uint8]]:
        area = np.memmap(place.path, np.uint8, "r", place.begin, (place.pages * PAGE,))
        try:
            if hasattr(mmap, "MADV_RANDOM"):
                area._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
            yield area
        finally:
            del area

    @contextlib.contextmanager
    def take() -> Iterator[Contender]:
        with mapped() as area:
            items = area.view(np.ndarray).reshape(-1, place.row_bytes)
            out = np.zeros((most_rows, place.row_bytes), dtype=np.uint8)

            def call(ids: Ints) -> NDArray[Any]:
                return np.take(items, ids, axis=0, out=out[: len(ids)], mode="clip")

            del area
            yield Contender("numpy take(out=)", call, place.read, kind="raw", maps=True, most_rows=most_rows)

    @contextlib.contextmanager
    def indexed() -> Iterator[Contender]:
        with mapped() as area:
            items, index = rows_of(area)

            def call(ids: Ints) -> NDArray[Any]:
                return np.asarray(items[index(ids)]).view(np.uint8).reshape(len(ids), place.row_bytes)

            del area
            yield Contender("numpy memmap[ids]", call, place.read, kind="raw", maps=True, most_rows=most_rows)

    found = [Opener("numpy memmap[ids]", indexed, (place.path,))]
    return [Opener("numpy take(out=)", take, (place.path,)), *found] if place.tight else found


def engramdb_openers(place: Place, scratch: Path, progress: Progress) -> list[Opener]:
    """EngramDB 0.3.0's readers over copies of the same rows in its layout: one shard, and eight.

    Raises BenchError where engramdb-python is not installed.
    """
    try:
        engramdb = importlib.import_module("engramdb")
    except ImportError as wrong:
        hint = "pip install engramdb-python==0.3.0"
        raise BenchError(f"engramdb-python cannot be used: {wrong}", hint=hint) from None
    shards = _SHARDS if place.rows >= _SHARDS else 1
    one, many = scratch / "one", scratch / "many"
    single = _copies(place, one, 1, progress)
    split = _copies(place, many, shards, progress)
    manifest = {"grans": place.rows, "slot_bytes": place.row_bytes}
    (one / "shard_000.manifest.json").write_text(json.dumps(manifest))

    def plain(name: str, make: Callable[[], Callable[[list[int]], bytes]], files: tuple[Path, ...]) -> Opener:
        @contextlib.contextmanager
        def opened() -> Iterator[Contender]:
            fetch = make()

            def call(ids: Ints) -> NDArray[Any]:
                return np.frombuffer(fetch(ids.tolist()), np.uint8).reshape(-1, place.row_bytes)

            yield Contender(name, call, place.read, kind="raw", most_rows=_SLOW_ROWS)

        return Opener(name, opened, files)

    def paged(name: str, reader: str) -> Opener:
        @contextlib.contextmanager
        def opened() -> Iterator[Contender]:
            pages = getattr(engramdb, reader)(PAGE)
            handle = os.open(place.path, os.O_RDONLY)

            def call(ids: Ints) -> NDArray[Any]:
                starts = place.starts(ids)
                wanted, inverse = np.unique(starts // PAGE, return_inverse=True)
                found = pages.read_pages([handle] * len(wanted), (wanted * PAGE).tolist())
                content = np.frombuffer(b"".join(found), np.uint8)
                at = inverse * PAGE + starts % PAGE
                rows: Bytes = content[at[:, None] + np.arange(place.row_bytes)]
                return rows

            try:
                yield Contender(name, call, place.read, kind="raw", most_rows=_SLOW_ROWS)
            finally:
                os.close(handle)

        return Opener(name, opened, (place.path,))

    def store(folder: Path, count: int) -> Callable[[], Callable[[list[int]], bytes]]:
        return lambda: engramdb.Store(str(folder), count, -(-place.rows // count), place.row_bytes).fetch

    return [
        plain("EngramDB Store, 1 shard", store(one, 1), single),
        plain(f"EngramDB Store, {shards} shards", store(many, shards), split),
        plain("EngramDB View", lambda: engramdb.View(str(single[0])).read_records, single),
        paged("EngramDB PageReader", "PageReader"),
        paged("EngramDB IoUringPageReader", "IoUringPageReader"),
    ]  # fmt: skip


def _copies(place: Place, folder: Path, shards: int, progress: Progress) -> tuple[Path, ...]:
    """The rows one after another without page padding, in files of equally many rows."""
    folder.mkdir(parents=True)
    per_shard = -(-place.rows // shards)
    block = max(1, _COPY_BYTES // place.row_bytes)
    files = []
    area = np.memmap(place.path, np.uint8, "r", place.begin, (place.pages, PAGE))
    used = place.rows_per_page * place.row_bytes
    with progress.task("copy the rows for EngramDB", per_shard * shards, "rows") as task:
        for shard in range(shards):
            files.append(folder / f"shard_{shard:03d}.bin")
            with files[-1].open("wb") as file:
                first, end = shard * per_shard, (shard + 1) * per_shard
                for begin in range(first, end, block):
                    count = min(block, end - begin)
                    first_page, last_page = begin // place.rows_per_page, (begin + count - 1) // place.rows_per_page
                    rows = area[first_page : last_page + 1, :used].reshape(-1, place.row_bytes)
                    skipped = begin - first_page * place.rows_per_page
                    file.write(rows[skipped : skipped + count].tobytes().ljust(count * place.row_bytes, b"\0"))
                    task.advance(count)
                file.flush()
                os.fsync(file.fileno())
    return tuple(files)
