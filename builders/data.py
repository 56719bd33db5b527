"""From a token cache to batches: documents stay apart, the order follows from the seed, a cursor finds any batch again.

A row of a batch is a piece of one document, padded on the right. Nothing crosses documents, whatever the backbone:
causal models (attention, recurrence and our convolution alike) do not see what stands to the right, and no two
documents share a row. Pieces of like length share a batch, whose size is counted in tokens, so little is padding.

Shape letters: B rows, T positions, J look-back positions of the hash, C columns of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram import EngramError
from engram.builders.layout import Layout
from engram.builders.token_cache import TokenCache

NOT_A_TARGET = -100  # torch's cross entropy ignores it
WINDOW = 64  # batches' worth of pieces that are sorted by length together

Ints = NDArray[np.int64]


class DataError(EngramError):
    """A corpus that gives nothing to train or to evaluate on."""


@dataclass(frozen=True)
class Batch:
    """Inputs and targets int64 [B, T] (target NOT_A_TARGET on padding and on what every text begins with), table rows
    int64 [B, T, C] by layer."""

    ids_BT: Ints
    targets_BT: Ints
    rows: dict[int, Ints]

    @property
    def tokens(self) -> int:
        """Positions that predict a token."""
        return int((self.targets_BT != NOT_A_TARGET).sum())


@dataclass(frozen=True)
class Pieces:
    """Documents cut into pieces: piece i predicts `length[i]` tokens of `document[i]`, the first at `begin[i]` + 1.

    Pieces of one document follow each other without overlap or gap: every token but a document's first is a target
    exactly once.
    """

    document: Ints
    begin: Ints
    length: Ints

    @classmethod
    def cut(cls, documents: Ints, lengths: Ints, longest: int) -> Pieces:
        """Cut documents (their numbers, and their tokens) into pieces of at most `longest` targets."""
        targets = np.maximum(lengths - 1, 0)
        counts = -(-targets // longest)
        first = np.cumsum(counts) - counts
        number = np.arange(counts.sum()) - np.repeat(first, counts)
        begin = number * longest
        length = np.minimum(np.repeat(targets, counts) - begin, longest)
        return cls(np.repeat(documents, counts), begin, length)

    def __len__(self) -> int:
        return len(self.begin)


@dataclass(frozen=True)
class Cursor:
    """Where training stands: steps of this epoch that are done."""

    epoch: int = 0
    step: int = 0


class Stream:
    """Training batches in an order that the seed decides."""

    def __init__(
        self,
        cache: TokenCache,
        documents: Ints,
        layout: Layout,
        *,
        length: int,
        batch: int,
        accumulation: int,
        seed: int,
        first: Sequence[int] = (),
    ) -> None:
        self.cache, self.layout, self.accumulation, self.seed = cache, layout, accumulation, seed
        self.first = first
        self.budget = length * batch
        self.pieces = Pieces.cut(documents, cache.lengths()[documents], length)
        if not len(self.pieces):
            raise DataError(
                f"the corpus has no document of two tokens to train on ({len(documents)} documents)",
                hint="name more data.sources, or hold less out",
            )
        self._planned: tuple[int, list[Ints]] = (-1, [])

    @property
    def tokens(self) -> int:
        """Tokens that one epoch predicts."""
        return int(self.pieces.length.sum())

    def plan(self, epoch: int) -> list[Ints]:
        """The epoch's batches, as piece numbers: a permutation of all pieces, like lengths together."""
        if self._planned[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            order = generator.permutation(len(self.pieces))
            mean = max(1, int(self.pieces.length.mean()))
            window = max(1, WINDOW * self.budget // mean)
            batches: list[Ints] = []
            for begin in range(0, len(order), window):
                some = order[begin : begin + window]
                some = some[np.argsort(-self.pieces.length[some], kind="stable")]
                batches += _fill(some, self.pieces.length[some], self.budget)
            self._planned = (epoch, [batches[i] for i in generator.permutation(len(batches))])
        return self._planned[1]

    def steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch; the last may have fewer batches to accumulate."""
        return -(-len(self.plan(epoch)) // self.accumulation)

    def step(self, cursor: Cursor) -> tuple[list[Batch], Cursor]:
        """The batches of one optimizer step, and where the next one stands."""
        plan = self.plan(cursor.epoch)
        begin = cursor.step * self.accumulation
        batches = [
            collate(self.cache, self.layout, self.pieces, some, self.first)
            for some in plan[begin : begin + self.accumulation]
        ]
        after = Cursor(cursor.epoch, cursor.step + 1)
        return batches, after if after.step < self.steps(cursor.epoch) else Cursor(cursor.epoch + 1, 0)


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents, and what of them is evaluated: whole documents in the order of their hashes.

    The document with which `eval_tokens` is reached is cut there; its bytes count in proportion to its tokens.
    """

    documents: Ints
    sha256: str
    pieces: Pieces
    tokens: int
    bytes: float

    @classmethod
    def choose(cls, cache: TokenCache, documents: Ints, length: int, eval_tokens: int) -> HeldOut:
        """Pick what is evaluated; `sha256` is over the sorted hashes of all held-out documents (little-endian u64)."""
        hashes = cache.hashes()[documents]
        digest = hashlib.sha256(np.sort(hashes).astype("<u8").tobytes()).hexdigest()
        chosen = documents[np.argsort(hashes, kind="stable")]
        lengths, sizes = cache.lengths()[chosen], cache.byte_counts()[chosen]
        before = np.cumsum(np.maximum(lengths - 1, 0)) - np.maximum(lengths - 1, 0)
        kept = np.clip(eval_tokens - before, 0, np.maximum(lengths - 1, 0))
        some = kept > 0
        pieces = Pieces.cut(chosen[some], kept[some] + 1, length)
        share = (kept[some] + 1) / lengths[some]
        return cls(documents, digest, pieces, int(kept.sum()), float((share * sizes[some]).sum()))

    def batches(
        self, cache: TokenCache, layout: Layout, budget: int, first: Sequence[int] = ()
    ) -> Iterator[Batch]:
        """What is evaluated, in a fixed order, `budget` positions a batch."""
        order = np.argsort(-self.pieces.length, kind="stable")
        for some in _fill(order, self.pieces.length[order], budget):
            yield collate(cache, layout, self.pieces, some, first)


def _fill(pieces: Ints, lengths_descending: Ints, budget: int) -> list[Ints]:
    """Cut a list of pieces, longest first, into batches of at most `budget` positions, padding included."""
    out, begin = [], 0
    while begin < len(pieces):
        count = max(1, budget // int(lengths_descending[begin]))
        out.append(pieces[begin : begin + count])
        begin += count
    return out


def collate(
    cache: TokenCache, layout: Layout, pieces: Pieces, chosen: Sequence[int] | Ints, first: Sequence[int] = ()
) -> Batch:
    """Read pieces and hash them. The hash looks back into the document before the piece, never into another one.

    The ids `first` (the tokenizer's bos) stand before every piece, so that the backbone reads what it was made for, and
    predict nothing. For the hash they stand before the document.
    Padding repeats the rows of the last real position, so that it touches no row of its own.
    """
    back = layout.orders[-1] - 1
    longest = max(int(pieces.length[i]) for i in chosen)
    shape = (len(chosen), longest)
    ids_BT = np.zeros(shape, dtype=np.int64)
    targets_BT = np.full(shape, NOT_A_TARGET, dtype=np.int64)
    before_BJ = np.full((len(chosen), back), layout.pad_id, dtype=np.int64)
    start_BX = np.zeros((len(chosen), back + longest), dtype=bool)
    last_B = np.empty(len(chosen), dtype=np.int64)
    for row, piece in enumerate(chosen):
        start, length = int(pieces.begin[piece]), int(pieces.length[piece])
        begin = len(first) + start  # in the document with what stands before it
        seen = min(begin, back)
        read = cache.document(int(pieces.document[piece]))[max(0, start - seen) : start + length + 1]
        text = np.concatenate([np.array(first[begin - seen :], dtype=np.int64), read])
        before_BJ[row, back - seen :] = text[:seen]
        ids_BT[row, :length] = text[seen:-1]
        targets_BT[row, :length] = text[seen + 1 :]
        start_BX[row, : back - seen] = True
        start_BX[row, back - seen] = begin == seen  # where the document itself begins
        last_B[row] = length - 1
    absolute = layout.rows(np.concatenate([before_BJ, ids_BT], axis=1), start_BT=start_BX)
    place_BT = np.minimum(np.arange(longest), last_B[:, None])
    rows = {n: np.take_along_axis(of[:, back:], place_BT[:, :, None], axis=1) for n, of in absolute.items()}
    return _begun(Batch(ids_BT, targets_BT, rows), layout, np.array([first], dtype=np.int64))


def _begun(batch: Batch, layout: Layout, first_1K: Ints) -> Batch:
    """The batch with the same ids before every row."""
    if not first_1K.size:
        return batch
    first_BK = np.repeat(first_1K, len(batch.ids_BT), axis=0)
    rows = layout.rows(first_BK)
    return Batch(
        np.concatenate([first_BK, batch.ids_BT], axis=1),
        np.concatenate([np.full_like(first_BK, NOT_A_TARGET), batch.targets_BT], axis=1),
        {n: np.concatenate([rows[n], of], axis=1) for n, of in batch.rows.items()},
    )
