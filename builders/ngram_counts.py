"""How often every n-gram of a corpus occurs, exactly, in bounded memory.

An n-gram is what a position looks up: its compressed ids at distances 0 … n-1, with the layout's fill where the walk
back is blocked (document start, reset, dead token). So every token makes one lookup per order, and the first tokens of
a document count with their padding, as the hash sees them.

The ids of the highest order whose V'^n fits 64 bits are packed into one number, nearest id first; a lower order is that
number divided by a power of V', so one sorted stream counts them all. An order that does not fit is keyed by the first
layer's 63-bit mix: its number of distinct n-grams is then an estimate (two n-grams with one mix count as one).

Shard by shard the keys are sorted, counted and written (`runs`); the runs are then merged piece by piece of the key
range (`parts`). A finished run or part is found again after an interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.layout import Layout
from engram.builders.token_cache import TokenCache
from engram.kernels import reference

Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]

PART_ENTRIES = 4 << 20  # entries of all runs that are merged at once
SAMPLE_EVERY = 1 << 12  # of a run's keys, to find where to cut the key range
SMALL_COUNT = 1 << 16
WORKERS = 2  # numpy sorts outside the interpreter's lock; each takes about 100 bytes a token of a shard


@dataclass
class OrderCounts:
    """The counts of one order: `histogram` maps a count to the number of n-grams that occur so often."""

    order: int
    exact: bool
    distinct: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    top_keys: Keys = field(default_factory=lambda: np.empty(0, np.uint64))
    top_counts: Counts = field(default_factory=lambda: np.empty(0, np.int64))

    def add(self, keys: Keys, counts: Counts, top: int) -> None:
        """Take in the ascending, distinct keys of one part."""
        self.distinct += len(keys)
        small = np.bincount(counts[counts < SMALL_COUNT])
        for count in np.flatnonzero(small).tolist():
            self.histogram[count] = self.histogram.get(count, 0) + int(small[count])
        for count in counts[counts >= SMALL_COUNT].tolist():
            self.histogram[count] = self.histogram.get(count, 0) + 1
        if len(self.top_counts) == top:  # ties go to the lower key, and later parts have higher keys
            better = counts > (self.top_counts[-1] if top else np.iinfo(np.int64).max)
            keys, counts = keys[better], counts[better]
        keys, counts = np.concatenate([self.top_keys, keys]), np.concatenate([self.top_counts, counts])
        if len(counts) > top > 0:  # all above the top-th count, and of its equals the first: the lowest keys
            least = _largest(counts, top)
            above = np.flatnonzero(counts > least)
            kept = np.concatenate([above, np.flatnonzero(counts == least)[: top - len(above)]])
            keys, counts = keys[kept], counts[kept]
        chosen = np.lexsort((keys, -counts))[:top]
        self.top_keys, self.top_counts = keys[chosen], counts[chosen]

    def coverage(self, ranks: list[int]) -> list[float]:
        """Share of all lookups that the `rank` most frequent n-grams make, for each rank."""
        counts = np.array(sorted(self.histogram, reverse=True), dtype=np.float64)
        numbers = np.array([self.histogram[int(count)] for count in counts], dtype=np.float64)
        at = np.concatenate([[0.0], np.cumsum(numbers)])
        lookups = np.concatenate([[0.0], np.cumsum(numbers * counts)])
        shares: list[float] = (np.interp(ranks, at, lookups) / lookups[-1]).tolist()
        return shares


def windows(layout: Layout, ids: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Ids at distance 0 … highest order - 1 for a run of documents: K arrays int64 [T], as the layout's hash sees them.

    ids: raw, [T]; lengths: tokens of each document, summing to T.
    """
    depth = layout.orders[-1]
    starts = (np.cumsum(lengths) - lengths)[lengths > 0]
    raw = np.asarray(ids, dtype=np.int64)
    compressed = layout.compress(raw)
    fill = layout.reset_id if layout.reset_id is not None else int(layout.compress(np.array(layout.pad_id)))
    if layout.reset_id is None and not layout.dead_ids:
        out = [compressed]
        for k in range(1, depth):
            shifted = np.empty_like(compressed)
            shifted[k:] = compressed[:-k]
            for j in range(k):
                shifted[(starts + j)[starts + j < len(raw)]] = fill
            out.append(shifted)
        return out
    start = np.zeros(len(raw), dtype=bool)
    start[starts] = True
    dead = np.isin(raw, layout.dead_ids) if layout.dead_ids else np.zeros(len(raw), dtype=bool)
    stop = dead if layout.reset_id is None else dead | (raw == layout.reset_id)
    none = np.ones((1, depth - 1), dtype=bool)
    tokens_BTK = reference.look_back(
        compressed[None], dead[None], np.concatenate([~none, start[None]], 1), np.concatenate([none, stop[None]], 1),
        np.zeros((1, depth - 1), dtype=np.int64), fill=fill, depth=depth,
    )  # fmt: skip
    return [np.ascontiguousarray(tokens_BTK[0, :, k]) for k in range(depth)]


def mix(layout: Layout, tokens: list[NDArray[np.int64]], order: int) -> NDArray[np.int64]:
    """The first layer's hash of an order before the modulus: XOR of id times multiplier, int64 [T]."""
    multipliers = layout.multipliers[layout.layers[0]]
    mixed = tokens[0] * np.int64(multipliers[0])
    for k in range(1, order):
        mixed ^= tokens[k] * np.int64(multipliers[k])
    return mixed


class NgramCounts:
    """Counts the n-grams of a token cache; works in `folder`, which the caller removes when it is done."""

    def __init__(self, cache: TokenCache, layout: Layout, folder: Path, top: int) -> None:
        """`layout` gives ids, orders and look-back rule, its primes play no part; `top` n-grams are kept per order."""
        self.cache, self.layout, self.folder, self.top = cache, layout, folder, top
        self.base = layout.compressed_size
        packed = [order for order in layout.orders if self.base**order < 2**64]
        self.streams = [max(packed)] if packed else []
        self.streams += [order for order in layout.orders if order not in packed]
        self.orders = {order: OrderCounts(order, exact=order in packed) for order in layout.orders}

    def run(self, progress: Progress = Progress()) -> None:
        """Count: fills `orders` and leaves the merged parts on disk for `parts`."""
        self._prepare()
        shards = self.cache.shards()
        with progress.task("count n-grams", self.cache.tokens, "tokens") as task:
            with ThreadPoolExecutor(WORKERS, thread_name_prefix="count") as pool:
                for tokens in pool.map(self._count_shard, range(len(shards)), shards):
                    task.advance(tokens)
        for order in self.streams:
            self._merge(order, len(shards), progress)

    def parts(self, order: int) -> Iterator[tuple[Keys, Counts]]:
        """The distinct keys of an order and their counts, ascending, piece by piece."""
        stream = self._stream(order)
        for number in range(len(list(self.folder.glob(f"part-{stream}-*.npy")))):
            keys, counts = self._load(stream, "part", number)
            yield self._coarsen(keys, counts, stream, order)

    def unpack(self, keys: Keys, order: int) -> list[NDArray[np.int64]]:
        """Compressed ids at distances 0 … order-1 from an exact order's keys."""
        out, rest = [], keys
        for k in range(order - 1, -1, -1):
            place = np.uint64(self.base**k)
            digit = rest // place
            rest = rest - digit * place
            out.append(digit.astype(np.int64))
        return out

    def mixes(self, keys: Keys, order: int) -> NDArray[np.int64]:
        """The first layer's hash, before the modulus, of keys of any order."""
        if not self.orders[order].exact:
            return keys.astype(np.int64)
        return mix(self.layout, self.unpack(keys, order), order)

    def top_tokens(self, order: int) -> NDArray[np.int64]:
        """Compressed ids of the most frequent n-grams in reading order (oldest first), int64 [top, order]."""
        counts = self.orders[order]
        if counts.exact:
            return np.stack(self.unpack(counts.top_keys, order)[::-1], axis=1)
        found = np.zeros((len(counts.top_keys), order), dtype=np.int64)
        by_key = np.argsort(counts.top_keys)
        wanted, missing = counts.top_keys[by_key], np.ones(len(by_key), dtype=bool)
        for number, path in enumerate(self.cache.shards()):
            if not missing.any():
                break
            tokens = windows(self.layout, np.load(path), self.cache.shard_documents(number))
            keys = self._keys(tokens, order)
            place = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
            hits = np.flatnonzero(wanted[place] == keys)
            found[by_key[place[hits]]] = np.stack([tokens[k][hits] for k in range(order - 1, -1, -1)], axis=1)
            missing[place[hits]] = False
        return found

    def _count_shard(self, number: int, path: Path) -> int:
        """Write the runs of one shard; its tokens."""
        lengths = self.cache.shard_documents(number)
        if not self._path(self.streams[-1], "run", number).is_file():
            tokens = windows(self.layout, np.load(path), lengths)
            for order in self.streams:
                keys = self._keys(tokens, order)
                keys.sort()
                self._save(order, "run", number, *_count(keys))
        return int(lengths.sum())

    def _stream(self, order: int) -> int:
        return self.streams[0] if self.orders[order].exact else order

    def _keys(self, tokens: list[NDArray[np.int64]], order: int) -> Keys:
        if not self.orders[order].exact:
            return mix(self.layout, tokens, order).astype(np.uint64)
        keys = tokens[0].astype(np.uint64)
        for k in range(1, order):
            keys *= np.uint64(self.base)
            keys += tokens[k].astype(np.uint64)
        return keys

    def _coarsen(self, keys: Keys, counts: Counts, stream: int, order: int) -> tuple[Keys, Counts]:
        if stream == order:
            return keys, counts
        return _count(keys // np.uint64(self.base ** (stream - order)), counts)

    def _merge(self, stream: int, runs: int, progress: Progress) -> None:
        cuts = self._cuts(stream, runs)
        places = []
        for number in range(runs):
            keys, _ = self._load(stream, "run", number, mapped=True)
            places.append(np.concatenate([[0], np.searchsorted(keys, cuts), [len(keys)]]))
        derived = [order for order in self.layout.orders if self._stream(order) == stream]
        with progress.task(f"merge {stream}-grams", len(cuts) + 1, "parts") as task:
            for part in range(len(cuts) + 1):
                if self._path(stream, "part", part).is_file():
                    merged = self._load(stream, "part", part)
                else:
                    merged = self._merge_part(stream, [(int(p[part]), int(p[part + 1])) for p in places])
                    self._save(stream, "part", part, *merged)
                for order in derived:
                    self.orders[order].add(*self._coarsen(*merged, stream, order), self.top)
                task.advance(1)

    def _merge_part(self, stream: int, slices: list[tuple[int, int]]) -> tuple[Keys, Counts]:
        keys, counts = [], []
        for number, (first, last) in enumerate(slices):
            run_keys, run_counts = self._load(stream, "run", number, mapped=True)
            keys.append(np.array(run_keys[first:last]))
            counts.append(np.array(run_counts[first:last]))
        if len(slices) == 1:
            return keys[0], counts[0]
        joined, weights = np.concatenate(keys), np.concatenate(counts)
        order = np.argsort(joined)
        return _count(joined[order], weights[order])

    def _cuts(self, stream: int, runs: int) -> Keys:
        """Where the key range is cut so that a part holds about PART_ENTRIES; no n-gram of a lower order is torn."""
        samples, entries = [np.empty(0, np.uint64)], 0
        for number in range(runs):
            keys, _ = self._load(stream, "run", number, mapped=True)
            samples.append(np.array(keys[::SAMPLE_EVERY]))
            entries += len(keys)
        sample = np.sort(np.concatenate(samples))
        pieces = -(-entries // PART_ENTRIES)
        cuts = sample[np.arange(1, pieces) * len(sample) // pieces] if pieces > 1 else sample[:0]
        lowest = min(order for order in self.layout.orders if self._stream(order) == stream)
        step = np.uint64(self.base ** (stream - lowest))
        return np.unique(cuts // step * step)

    def _prepare(self) -> None:
        """Keep what an interrupted count of the very same input left; remove anything else."""
        layout = self.layout.to_json()
        rule = {
            name: layout[name]
            for name in (
                "dialect",
                "orders",
                "layers",
                "multipliers",
                "pad_id",
                "reset_id",
                "dead_ids",
                "token_map_sha256",
            )
        }
        mark = json.dumps({"cache": str(self.cache.folder), "tokens": self.cache.tokens, **rule}, sort_keys=True)
        path = self.folder / "input.json"
        if not path.is_file() or path.read_text() != mark:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            path.write_text(mark)

    def _path(self, stream: int, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{stream}-{number:05d}.npy"

    def _save(self, stream: int, kind: str, number: int, keys: Keys, counts: Counts) -> None:
        """One file [keys | counts] of uint64, so that it is either there or not; scratch data needs no fsync."""
        path = self._path(stream, kind, number)
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            np.save(file, np.stack([keys, counts.astype(np.uint64)]), allow_pickle=False)
        temporary.replace(path)

    def _load(self, stream: int, kind: str, number: int, *, mapped: bool = False) -> tuple[Keys, Counts]:
        both = np.load(self._path(stream, kind, number), mmap_mode="r" if mapped else None, allow_pickle=False)
        return both[0], both[1].view(np.int64)


def _count(keys: Keys, weights: Counts | None = None) -> tuple[Keys, Counts]:
    """Distinct values of ascending keys, and how often each occurs (or the sum of its weights)."""
    if not len(keys):
        return keys, np.empty(0, np.int64)
    first = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
    if weights is not None:
        return keys[first], np.add.reduceat(weights, first)
    return keys[first], np.diff(first, append=len(keys))


def _largest(counts: Counts, place: int) -> int:
    """The `place`-th largest count, by a histogram: a selection is slow where nearly all counts are 1."""
    many = np.bincount(np.minimum(counts, SMALL_COUNT), minlength=SMALL_COUNT + 1)
    if many[SMALL_COUNT] >= place:
        return int(np.sort(counts[counts >= SMALL_COUNT])[-place])
    return SMALL_COUNT - int(np.searchsorted(np.cumsum(many[::-1]), place))
