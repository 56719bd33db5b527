"""What a user's text says about the rows of a table: how often each is read, and how far its gate opens.

Rows that no text read still have a weight: Good and Turing's estimate gives them together the share of look-ups that
found a row for the first and only time.

Shape letters: T positions, C columns, U distinct rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Progress
from engram.builders.layout import Layout
from engram.builders.token_cache import TokenCache
from engram.runtime.quality import Judge

Ints = NDArray[np.int64]

_PIECE = 1 << 15  # tokens hashed at a time
_MERGE = 1 << 22  # look-ups gathered before they are counted


class CalibrateError(EngramError):
    """Text that says nothing about a table."""


@dataclass(frozen=True)
class RowWeights:
    """Ascending rows that the text read, how often, and the mean of gate² over all look-ups of the layer.

    `opening_U` is the mean of gate² of a row's own look-ups where they were watched, else the layer's.
    """

    rows_U: Ints
    reads_U: Ints
    opening_U: NDArray[np.float64]
    reads: int

    @property
    def weight_U(self) -> NDArray[np.float64]:
        """Reads times opening."""
        return self.reads_U * self.opening_U

    def unseen_weight(self, rows: int) -> float:
        """What each of the table's other rows weighs."""
        unseen = rows - len(self.rows_U)
        singles = int((self.reads_U == 1).sum())
        opening = float((self.reads_U * self.opening_U).sum() / max(1, self.reads))
        return singles * opening / unseen if unseen else 0.0


def count_rows(
    cache: TokenCache, layout: Layout, documents: Sequence[int], progress: Progress
) -> dict[int, RowWeights]:
    """How often each row is read by these documents, every opening 1."""
    counted = {n: (np.empty(0, np.int64), np.empty(0, np.int64)) for n in layout.layers}
    waiting: dict[int, list[Ints]] = {n: [] for n in layout.layers}
    held = 0
    lengths = cache.lengths()
    with progress.task("count rows", int(lengths[list(documents)].sum()), "tokens") as task:
        for document in documents:
            ids_T = cache.document(document).astype(np.int64)
            history = None
            for begin in range(0, len(ids_T), _PIECE):
                part = ids_T[None, begin : begin + _PIECE]
                rows = layout.rows(part, history)
                history = layout.history(part, history)
                for n in layout.layers:
                    waiting[n].append(rows[n].reshape(-1))
                held += rows[layout.layers[0]].size
                task.advance(part.shape[1])
            if held >= _MERGE:
                counted, held = {n: _merged(counted[n], waiting[n]) for n in layout.layers}, 0
    counted = {n: _merged(counted[n], waiting[n]) for n in layout.layers}
    found = {}
    for n, (rows_U, reads_U) in counted.items():
        if not len(rows_U):
            raise CalibrateError(f"the calibration text reads no row of layer {n}", hint="give a longer text")
        found[n] = RowWeights(rows_U, reads_U, np.ones(len(rows_U)), int(reads_U.sum()))
    return found


def _merged(before: tuple[Ints, Ints], waiting: list[Ints]) -> tuple[Ints, Ints]:
    """Counts with the waiting look-ups added; empties the list. (np.union1d hashes: 8 times slower at millions.)"""
    if not waiting:
        return before
    rows_U, reads_U = np.unique(np.concatenate(waiting), return_counts=True)
    waiting.clear()
    place_U = np.searchsorted(before[0], rows_U)
    known_U = np.append(before[0], -1)[place_U] == rows_U
    before[1][place_U[known_U]] += reads_U[known_U]
    new, place = ~known_U, place_U[~known_U]
    return np.insert(before[0], place, rows_U[new]), np.insert(before[1], place, reads_U[new])


def with_openings(weights: Mapping[int, RowWeights], judge: Judge) -> dict[int, RowWeights]:
    """The same rows with the openings that the judge's windows showed."""
    found = {}
    for n, weight in weights.items():
        watched_U, sums_U = np.zeros(len(weight.rows_U)), np.zeros(len(weight.rows_U))
        total, look_ups = 0.0, 0
        for rows, opening in judge.openings():
            rows_TC, opening_T = rows[n], opening[n]
            total += float(opening_T.sum()) * rows_TC.shape[1]
            look_ups += rows_TC.size
            place = np.searchsorted(weight.rows_U, rows_TC.reshape(-1))
            place = np.minimum(place, len(weight.rows_U) - 1)
            known = weight.rows_U[place] == rows_TC.reshape(-1)
            each = np.repeat(opening_T, rows_TC.shape[1])
            watched_U += np.bincount(place[known], minlength=len(watched_U))
            sums_U += np.bincount(place[known], weights=each[known], minlength=len(watched_U))
        mean = total / max(1, look_ups)
        opening_U = np.divide(sums_U, watched_U, out=np.full(len(watched_U), mean), where=watched_U > 0)
        found[n] = RowWeights(weight.rows_U, weight.reads_U, opening_U, weight.reads)
    return found
