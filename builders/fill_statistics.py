"""What `engram fill` counts: next-token centroids of every row, whitened; and the split of documents it needs.

Shape letters: T positions, C columns (order-major), O orders, d row width, D hidden width, V vocabulary, N rows,
R kept directions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.layout import Layout
from engram.builders.token_cache import TokenCache

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

BATCH_TOKENS = 1 << 17
SAMPLE_CONTEXTS = 40_000  # n-gram contexts from which the directions are chosen
DOCUMENT_TOKENS = 1024  # read of one document for fitting and reporting
_BUCKETS = 1 << 25  # of the first pass's counters: a byte each
_WIDE = (1 << 61) - 1  # a prime modulus so large that distinct n-grams do not meet


@dataclass(frozen=True)
class Split:
    """Documents to count from, to fit scales on, and to report: each list by the documents' hashes."""

    count: Ints
    fit: Ints
    report: Ints


def split_documents(cache: TokenCache, fit_tokens: int, report_tokens: int) -> Split:
    """Equal texts have equal hashes and land in one part; the parts for fitting and reporting come first."""
    hashes, lengths = cache.hashes(), np.minimum(cache.lengths(), DOCUMENT_TOKENS)
    order = np.argsort(hashes, kind="stable")
    reached = np.cumsum(lengths[order])
    ends: list[int] = []
    before = 0
    for wanted in (fit_tokens, report_tokens):
        end = int(np.searchsorted(reached, before + wanted)) + 1
        while 0 < end < len(order) and hashes[order[end]] == hashes[order[end - 1]]:
            end += 1
        ends.append(min(end, len(order)))
        before = int(reached[ends[-1] - 1])
    return Split(order[ends[1] :], order[: ends[0]], order[ends[0] : ends[1]])


@dataclass(frozen=True)
class Positions:
    """Rows int64 [T, C] and n-gram keys int64 [T, O] of positions, and the token that follows each, int64 [T]."""

    rows_TC: Ints
    keys_TO: Ints
    next_T: Ints


def positions(layout: Layout, layer: int, documents: list[NDArray[np.int32]]) -> Positions:
    """Every position of some documents but the last of each."""
    ids = np.concatenate(documents).astype(np.int64)
    lengths = np.array([len(d) for d in documents])
    start = np.zeros(len(ids), dtype=bool)
    start[np.cumsum(lengths)[:-1]] = True
    start[0] = True
    keep = np.ones(len(ids), dtype=bool)
    keep[np.cumsum(lengths) - 1] = False
    wide = replace(
        layout, heads=1, primes={n: ((_WIDE,),) * len(layout.orders) for n in layout.layers},
        table_rows={n: _WIDE * len(layout.orders) for n in layout.layers},
    )  # fmt: skip
    rows = layout.rows(ids[None], start_BT=start[None], layers=[layer])[layer][0]
    keys = wide.rows(ids[None], start_BT=start[None], layers=[layer], local=True)[layer][0]
    return Positions(rows[keep], keys[keep], np.roll(ids, -1)[keep])


def batches(cache: TokenCache, documents: Ints) -> Iterator[list[NDArray[np.int32]]]:
    """Documents in groups of about BATCH_TOKENS; those with nothing to predict are left out."""
    group: list[NDArray[np.int32]] = []
    size = 0
    for i in documents:
        ids = cache.document(int(i))
        if len(ids) < 2:
            continue
        group.append(ids)
        size += len(ids)
        if size >= BATCH_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class Directions:
    """How next tokens become rows: each head holds some of the kept directions of the whitened unembedding."""

    targets_HVd: list[Floats]  # what a next token adds to a row, by head
    back_HdD: list[Floats]  # from a row to the final state, by head: all heads together give S⁻¹ centroid / D


def find_directions(
    unembedding_VD: Floats, unigram_V: NDArray[np.float64], sample: Positions, layout: Layout, ridge: float
) -> Directions:
    """Whiten by the covariance S of unembedding rows under the unigram distribution; keep the directions in which the
    centroids of frequent contexts differ most, and deal them out to the heads in turn."""
    share_V = unigram_V / unigram_V.sum()
    mean_D = share_V @ unembedding_VD
    centred = unembedding_VD - mean_D
    covariance = (centred * share_V[:, None]).T @ centred
    width = covariance.shape[0]
    covariance += ridge * np.trace(covariance) / width * np.eye(width)
    values, vectors = np.linalg.eigh(covariance)
    root_DD = (vectors / np.sqrt(values)) @ vectors.T  # S^(-1/2)
    whitened_VD = (centred @ root_DD).astype(np.float32)
    kept = min(width, layout.heads * layout.head_dim)
    second = np.zeros((width, width))
    for column in range(sample.keys_TO.shape[1]):
        _, place, counts = np.unique(sample.keys_TO[:, column], return_inverse=True, return_counts=True)
        order = np.argsort(place, kind="stable")
        sums = np.add.reduceat(whitened_VD[sample.next_T[order]], np.cumsum([0, *counts[:-1]]), axis=0)
        often = counts > 1
        shrunk = sums[often] / np.sqrt(counts[often, None] + 1.0)
        second += shrunk.T.astype(np.float64) @ shrunk
    _, basis = np.linalg.eigh(second)
    basis_DR = basis[:, ::-1][:, :kept]
    of_head_Hd = (np.arange(layout.head_dim)[None] * layout.heads + np.arange(layout.heads)[:, None]) % kept
    copies_R = np.bincount(of_head_Hd.ravel(), minlength=kept)  # heads that hold a direction share it
    targets_VR = (whitened_VD @ basis_DR).astype(np.float32)
    back_RD = (basis_DR.T @ root_DD / width / copies_R[:, None]).astype(np.float32)
    return Directions(
        [np.ascontiguousarray(targets_VR[:, of]) for of in of_head_Hd], [back_RD[of] for of in of_head_Hd]
    )


@dataclass(frozen=True)
class Counts:
    """Per row the sum of its occurrences' targets, float32 [N, d] (a file), and how many they are, float32 [N]."""

    sums_ND: Floats
    seen_N: Floats


def count_often(
    cache: TokenCache, documents: Ints, layout: Layout, layer: int, progress: Progress
) -> list[NDArray[np.uint8]]:
    """First pass: occurrences of every n-gram, by order, in saturating counters that n-grams share by their key."""
    counters = [np.zeros(_BUCKETS, dtype=np.uint8) for _ in layout.orders]
    with progress.task("count n-grams", int(cache.lengths()[documents].sum()), "tokens") as task:
        for group in batches(cache, documents):
            found = positions(layout, layer, group)
            for column, counter in enumerate(counters):
                bucket, times = np.unique(found.keys_TO[:, column] % _BUCKETS, return_counts=True)
                counter[bucket] = np.minimum(255, counter[bucket].astype(np.int64) + times)
            task.advance(sum(map(len, group)))
    return counters


def accumulate(
    cache: TokenCache, documents: Ints, layout: Layout, layer: int, directions: Directions,
    often: list[NDArray[np.uint8]], least: int, scratch: Path, progress: Progress,
) -> Counts:  # fmt: skip
    """Second pass: add every occurrence of an n-gram seen at least `least` times to its row of every head.

    The sums live in a file in `scratch`, written in ascending row order batch by batch; memory stays bounded by the
    batch. Rows that nothing is added to stay exactly zero.
    """
    rows = layout.table_rows[layer]
    path = scratch / "sums.f32"
    with path.open("wb") as file:  # claim the space now: a full disk must not surface as a bus error
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, rows * layout.head_dim * 4)
        file.truncate(rows * layout.head_dim * 4)
    sums = np.memmap(path, dtype=np.float32, mode="r+", shape=(rows, layout.head_dim))
    seen = np.zeros(rows, dtype=np.float32)
    with progress.task("fill rows", int(cache.lengths()[documents].sum()), "tokens") as task:
        for group in batches(cache, documents):
            found = positions(layout, layer, group)
            for column in range(layout.columns):
                order = column // layout.heads
                kept = np.flatnonzero(often[order][found.keys_TO[:, order] % _BUCKETS] >= least)
                if not kept.size:
                    continue
                place = found.rows_TC[kept, column]
                sequence = np.argsort(place, kind="stable")
                touched, begin, times = np.unique(place[sequence], return_index=True, return_counts=True)
                values = directions.targets_HVd[column % layout.heads][found.next_T[kept][sequence]]
                sums[touched] += np.add.reduceat(values, begin, axis=0)
                seen[touched] += times
            task.advance(sum(map(len, group)))
    return Counts(sums, seen)
