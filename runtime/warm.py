"""`engram warm`: which rows does the user's own text read, and does it help to keep them? Counted, written, measured.

Shape letters: T positions, C columns, U distinct rows, K bytes a row.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.atomic import put_in_place, sync_tree
from engram.builders.corpus import CorpusConfig
from engram.builders.layout import Layout
from engram.builders.process_memory import cached_bytes, forget_cached
from engram.builders.token_cache import TokenCache
from engram.quantize.package import Package, open_package
from engram.runtime import hot_rows
from engram.runtime.hot_rows import HotRowsError, Ints
from engram.runtime.reader import RowReader

HELD_OUT = 0.1
WORTH = 0.9  # kept where the cold time falls below this share
_DOCUMENTS = 20  # with fewer, the end of each is held out in place of whole ones
_CHUNK = 512  # positions of one request, as in a prefill
_TRIAL_TOKENS = 1 << 15
_ROUNDS = 3
_WAITING = 1 << 22  # rows that wait to be counted
_MOST = 1 << 24  # distinct rows that are counted; beyond it those that were read least are forgotten
_STRAY_BYTES = 1 << 20  # of a table that may be cached when it counts as cold: its header and checksums

Piece = tuple[int, int, int]  # document, first token, token after the last


@dataclass(frozen=True)
class WarmConfig:
    """Which package, from what text, and how many bytes of rows to keep at most."""

    package: Path
    text: CorpusConfig
    size: int = 64 << 20
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse a size that holds nothing."""
        if self.size < 1 << 12:
            raise HotRowsError(f"size {self.size} must be at least 4096 bytes")


class RowCounts:
    """How often each row was read, in bounded memory."""

    def __init__(self) -> None:
        self.rows_U: Ints = np.empty(0, dtype=np.int64)
        self.counts_U: Ints = np.empty(0, dtype=np.int64)
        self._waiting: list[Ints] = []
        self._size = 0

    def add(self, rows: Ints) -> None:
        """Count rows, of any shape."""
        self._waiting.append(rows.reshape(-1))
        self._size += rows.size
        if self._size >= _WAITING:
            self.settle()

    def settle(self) -> None:
        """Bring `rows_U` (ascending) and `counts_U` up to date."""
        if not self._waiting:
            return
        new_U, new_counts_U = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting, self._size = [], 0
        rows_U, inverse = np.unique(np.concatenate([self.rows_U, new_U]), return_inverse=True)
        counts_U = np.zeros(len(rows_U), dtype=np.int64)
        np.add.at(counts_U, inverse, np.concatenate([self.counts_U, new_counts_U]))
        if len(rows_U) > _MOST:
            kept = np.sort(np.argpartition(-counts_U, _MOST)[:_MOST])
            rows_U, counts_U = rows_U[kept], counts_U[kept]
        self.rows_U, self.counts_U = rows_U, counts_U


def warm(config: WarmConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Record the hot rows of a package and keep them if they help; the fields of `engram warm --json`.

    Rows are counted on nine tenths of the text. The last tenth is read from tables that are not in the page cache, with
    and without them; nothing is kept unless the time (reading the hot rows included) falls by more than a tenth. Raises
    HotRowsError for a table that mixes codecs, for too little text, or where the page cache cannot be emptied, and what
    package and corpus raise.
    """
    progress = progress or Progress()
    began = time.monotonic()
    with open_package(config.package) as package:
        tables = {n: hot_rows.one_codec(table) for n, table in package.layers.items()}
        cache = TokenCache.build(
            config.text, config.package / "tokenizer.json", progress, max_tokens=config.max_tokens
        )
        try:
            recorded, held_out = split(cache)
            counts = _count(package.layout, cache, recorded, progress)
            trial = _requests(package.layout, cache, held_out)
        finally:
            cache.discard()
        chosen = choose(counts, {n: table.row_bytes for n, table in tables.items()}, config.size)
        partial, target = _target(package)
        try:
            size = _write(package, chosen, partial)
            package.close()  # what is mapped cannot be dropped from the page cache
            figures = _measure(config.package, partial, trial, progress)
            kept = figures["cold_seconds"]["with"] < WORTH * figures["cold_seconds"]["without"]
            hot_rows.drop(package)
            if kept:
                put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    progress.say(f"kept in {target}" if kept else "removed again: they do not save a tenth of the cold time")
    return {
        "kept": kept, "out": str(target) if kept else None, "bytes": size,
        "rows": {n: len(rows_U) for n, rows_U in chosen.items()},
        "tokens": sum(end - begin for _, begin, end in recorded), **figures, "seconds": time.monotonic() - began,
    }  # fmt: skip


def drop(folder: Path) -> dict[str, Any]:
    """Remove the hot rows of a package; {"removed": folders}."""
    with open_package(folder) as package:
        return {"removed": [str(path) for path in hot_rows.drop(package)]}


def split(cache: TokenCache) -> tuple[list[Piece], list[Piece]]:
    """Pieces of text to count and pieces to measure on: whole documents, or the end of each where they are few."""
    lengths = cache.lengths().tolist()
    if cache.documents >= _DOCUMENTS and len(np.unique(cache.hashes())) >= 2:
        recorded, held_out = ([(int(i), 0, lengths[i]) for i in side] for side in cache.split(HELD_OUT))
    else:
        edges = [int(length * (1 - HELD_OUT)) for length in lengths]
        recorded = [(i, 0, edge) for i, edge in enumerate(edges) if edge]
        held_out = [(i, edge, lengths[i]) for i, edge in enumerate(edges) if edge < lengths[i]]
    if not recorded or not held_out:
        raise HotRowsError(f"the text has {sum(lengths)} tokens, too few to count on and to measure on")
    return recorded, held_out


def _chunks(layout: Layout, cache: TokenCache, pieces: list[Piece]) -> Iterator[tuple[int, dict[int, Ints]]]:
    """(tokens, rows by layer [1, T, C]) of the pieces, each a text that begins anew."""
    for document, begin, end in pieces:
        before = None
        for at in range(begin, end, _CHUNK):
            ids = cache.document(document)[at : min(at + _CHUNK, end)].astype(np.int64)[None]
            yield ids.shape[1], layout.rows(ids, before)
            before = layout.history(ids, before)


def _count(layout: Layout, cache: TokenCache, pieces: list[Piece], progress: Progress) -> dict[int, RowCounts]:
    counts = {n: RowCounts() for n in layout.layers}
    with progress.task("count rows", sum(end - begin for _, begin, end in pieces), "tokens") as task:
        for tokens, rows in _chunks(layout, cache, pieces):
            for n, rows_BTC in rows.items():
                counts[n].add(rows_BTC)
            task.advance(tokens)
    for count in counts.values():
        count.settle()
    return counts


def _requests(layout: Layout, cache: TokenCache, pieces: list[Piece]) -> list[dict[int, Ints]]:
    """What is read in the trial: the rows of the held-out text, up to a length, as a prefill asks for them."""
    out, tokens = [], 0
    for more, rows in _chunks(layout, cache, pieces):
        out.append(rows)
        tokens += more
        if tokens >= _TRIAL_TOKENS:
            break
    return out


def choose(counts: dict[int, RowCounts], row_bytes: dict[int, int], size: int) -> dict[int, Ints]:
    """The rows to keep, by layer, ascending: those read most often, twice at least, as many as `size` bytes hold."""
    layers = list(counts)
    often = {n: counts[n].counts_U > 1 for n in layers}
    rows = np.concatenate([counts[n].rows_U[often[n]] for n in layers])
    read = np.concatenate([counts[n].counts_U[often[n]] for n in layers])
    layer = np.repeat(layers, [int(often[n].sum()) for n in layers])
    order = np.argsort(-read, kind="stable")
    taken = np.cumsum([row_bytes[n] + 8 for n in layer[order].tolist()]) <= size
    kept = order[taken]
    if not kept.size:
        raise HotRowsError("the text reads no row twice", hint="give more text, or a larger --size")
    return {n: np.sort(rows[kept[layer[kept] == n]]) for n in layers}


def _target(package: Package) -> tuple[Path, Path]:
    """A new folder to write into and the place that it will take: in the package if it can be written to."""
    for target in hot_rows.places(package):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".hot-", dir=target.parent)), target
        except OSError as wrong:
            last = wrong
    raise HotRowsError(f"hot rows can be written neither into {package.folder} nor into {target.parent}: {last}")


def _write(package: Package, chosen: dict[int, Ints], folder: Path) -> int:
    """One file a layer; their size in bytes. Every row is copied from a page whose checksum was compared."""
    size = 0
    for n, rows_U in chosen.items():
        if len(rows_U):
            table, seal = hot_rows.one_codec(package.layers[n]), str(package.manifest["tables"][str(n)]["seal"])
            size += hot_rows.save(folder / hot_rows.file_name(n), rows_U, table.gather(rows_U), layer=n, seal=seal)
    folder.chmod(0o755)
    sync_tree(folder)
    return size


def _measure(folder: Path, hot: Path, trial: list[dict[int, Ints]], progress: Progress) -> dict[str, Any]:
    """Seconds from a cold page cache to all rows of the trial, with and without the hot rows; medians."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    served = 0.0
    with progress.task("measure from a cold page cache", 2 * _ROUNDS) as task:
        for turn in range(2 * _ROUNDS):
            arm = ("without", "with", "with", "without")[turn % 4]  # neither is always the one after the other
            spent, counters = _trial(folder, hot if arm == "with" else None, trial)
            seconds[arm].append(spent)
            if arm == "with":
                served = counters["rows_hot"] / max(1, counters["rows_asked"])
            task.advance()
    middle = {arm: statistics.median(times) for arm, times in seconds.items()}
    return {
        "held_out_tokens": sum(next(iter(rows.values())).shape[1] for rows in trial), "lookups_served": served,
        "cold_seconds": middle, "seconds_saved": middle["without"] - middle["with"],
    }  # fmt: skip


def _trial(folder: Path, hot: Path | None, trial: list[dict[int, Ints]]) -> tuple[float, dict[str, int]]:
    with open_package(folder) as package:
        files = [path for table in package.layers.values() for path in table.paths]
        for path in [*files, *(hot.iterdir() if hot else ())]:
            forget_cached(path)
        left = [cached_bytes(path) for path in files]
        if any(found is None or found > _STRAY_BYTES + path.stat().st_size // 100
               for found, path in zip(left, files, strict=True)):  # fmt: skip
            raise HotRowsError(
                f"the tables of {folder} cannot be measured cold: the page cache keeps {left} bytes of them",
                hint="end other programs that use this package, and put it on a local disk",
            )
        out: dict[int, NDArray[np.float32]] = {}
        for rows in trial:
            for n, rows_BTC in rows.items():
                shape = (1, rows_BTC.shape[1], rows_BTC.shape[2] * package.layers[n].width)
                if n not in out or out[n].shape != shape:
                    out[n] = np.ones(shape, dtype=np.float32)
        begin = time.perf_counter()
        reader = RowReader(package, "disk", hot=None if hot is None else hot_rows.load_all(package, hot))
        ahead = reader.ask(trial[0])
        for place, rows in enumerate(trial):
            ticket = ahead
            if place + 1 < len(trial):
                ahead = reader.ask(trial[place + 1])
            for n, rows_BTC in rows.items():
                reader.take(ticket, n, out[n] if out[n].shape[1] == rows_BTC.shape[1] else None)
        spent = time.perf_counter() - begin
        return spent, reader.counters()
