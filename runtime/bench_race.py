"""Fair timing: a parity gate first, then interleaved rounds in random order, fresh ids for every call, medians.

Shape letters: R rows of a call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import EngramError, Task

Ints = NDArray[np.int64]
Call = Callable[[Ints], Any]

_MOST_CALLS = 300  # of one turn
_LEAST_ROUNDS = 3


class ParityError(EngramError):
    """A contender whose output is not that of the reference: nothing is timed."""


class BenchError(EngramError):
    """A benchmark that cannot run as asked."""


@dataclass(frozen=True)
class Contender:
    """One way to do the job. `call` takes int64 [R] and returns what it wrote; the same memory may be reused.

    `truth` names the reference that the output must equal; `tolerance` is 0 (bit for bit) or, for peers with another
    arithmetic, the largest difference as a share of the largest value. `limit`: not a peer, but what memory allows.
    """

    name: str
    call: Call
    truth: Call
    tolerance: float = 0.0
    shown: Callable[[Any], NDArray[Any]] = np.asarray  # what the gate compares of a call's result; not timed
    limit: bool = False
    kind: str = "decoded"  # or "raw": the stored bytes
    maps: bool = False  # reads through a map of its own, whose pages are mapped in when first touched
    most_rows: int = 1 << 62  # larger calls are left out
    table_rows: int | None = None  # where its table is smaller: ids are taken modulo this, outside the clock


def gate(contenders: Sequence[Contender], wanted_ids: Ints) -> None:
    """Let every contender do the same rows and compare; ParityError names the first that differs."""
    for contender in contenders:
        ids = fitting(contender, wanted_ids[: contender.most_rows])
        wanted = contender.shown(contender.truth(ids))
        contender.call(np.roll(ids, 1))  # what it leaves in a buffer is not the answer to the next call
        found = contender.shown(contender.call(ids))
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise ParityError(
                f"{contender.name} gives {found.dtype} {list(found.shape)}, the reference {wanted.dtype} "
                f"{list(wanted.shape)}"
            )
        wrong = _differing(found, wanted, contender.tolerance)
        if wrong.any():
            row = int(np.argwhere(wrong.reshape(len(wrong), -1).any(axis=1))[0, 0])
            raise ParityError(
                f"{contender.name} differs from the reference in {int(wrong.sum()):,} of {wrong.size:,} values, first "
                f"for row {int(ids.reshape(-1)[row]) if row < ids.size else row}",
                hint="nothing was timed: a wrong answer has no speed",
            )


def fitting(contender: Contender, ids: Ints) -> Ints:
    """The ids, or where the contender's table is smaller, ids that it has."""
    return ids if contender.table_rows is None else ids % contender.table_rows


def _differing(found: NDArray[Any], wanted: NDArray[Any], tolerance: float) -> NDArray[np.bool_]:
    if tolerance == 0:
        same = f"u{found.dtype.itemsize}"
        different: NDArray[np.bool_] = np.ascontiguousarray(found).view(same) != np.ascontiguousarray(wanted).view(same)
        return different
    largest = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)) or 1.0
    far: NDArray[np.bool_] = ~np.isclose(found, wanted, rtol=0, atol=tolerance * largest, equal_nan=True)
    return far


class Trace:
    """Row ids to ask for, in a ring: every draw is the next piece, so that no call repeats the one before."""

    def __init__(self, rows: Ints) -> None:
        self.rows = np.ascontiguousarray(rows, dtype=np.int64)
        self._at = 0

    def draw(self, count: int) -> Ints:
        """The next `count` ids, int64 [count]; the trace begins again where it ends."""
        if self._at + count > len(self.rows):
            self._at = 0
            if count > len(self.rows):
                return np.resize(self.rows, count)
        piece = self.rows[self._at : self._at + count]
        self._at += count
        return piece


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contender at one batch size, a figure for each turn."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """Seconds a call: the median over the turns."""
        return statistics.median(self.seconds)


def race(
    contenders: Sequence[Contender],
    draw: Callable[[int], Ints],
    rows: int,
    *,
    rounds: int,
    turn_s: float,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    task: Task | None = None,
) -> dict[str, Timing]:
    """Time contenders at one batch size. One turn is as many calls as fill `turn_s`; each round has a new order."""
    taking_part = [contender for contender in contenders if rows <= contender.most_rows]
    calls = {contender.name: _calls(contender, draw, rows, turn_s) for contender in taking_part}
    times: dict[str, list[float]] = {contender.name: [] for contender in taking_part}
    order = np.random.default_rng(seed)
    for _ in range(max(_LEAST_ROUNDS, rounds)):
        for place in order.permutation(len(taking_part)).tolist():
            contender = taking_part[place]
            pieces = [fitting(contender, draw(rows)) for _ in range(calls[contender.name])]
            call = contender.call
            begin = clock()
            for ids in pieces:
                call(ids)
            times[contender.name].append((clock() - begin) / len(pieces))
            if task is not None:
                task.advance()
    return {name: Timing(tuple(found), calls[name]) for name, found in times.items()}


def _calls(contender: Contender, draw: Callable[[int], Ints], rows: int, turn_s: float) -> int:
    """Calls that fill a turn, from the faster of two tries."""
    spent = []
    for _ in range(2):
        ids = fitting(contender, draw(rows))
        begin = time.perf_counter()
        contender.call(ids)
        spent.append(time.perf_counter() - begin)
    return max(1, min(_MOST_CALLS, int(turn_s / max(min(spent), 1e-7))))


def in_random_order(names: Sequence[str], rounds: int, seed: int) -> Iterator[tuple[int, str]]:
    """(round, name): every name once a round, in a new order each time."""
    order = np.random.default_rng(seed)
    for number in range(rounds):
        for place in order.permutation(len(names)).tolist():
            yield number, names[place]


def ratio(times: Mapping[str, Timing], ours: str, theirs: str) -> float | None:
    """Our median time as a share of theirs; None where either did not take part."""
    if ours not in times or theirs not in times:
        return None
    return times[ours].median / times[theirs].median
