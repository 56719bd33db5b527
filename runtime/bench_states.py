"""Warm and cold: the two states in which `engram bench rows` measures a table file, each proven with mincore.

Shape letters: R rows of a call.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.process_memory import available_bytes
from engram.quantize.row_store import PAGE
from engram.runtime import device_probe
from engram.runtime.bench_files import Opener, Place
from engram.runtime.bench_race import Contender, Ints, Timing, Trace, fitting, in_random_order, race
from engram.runtime.coldness import device_bytes, make_cold, make_warm, resident_share

ROUNDS = 5
_PROBE_S = 0.3
_LEAST_TURN_S = 0.002
_COLD_CALLS = ((64, 40), (1024, 10))  # calls of up to so many rows after one drop; larger ones: one call


@dataclass(frozen=True)
class Effort:
    """How much is measured: rows a call, seconds a state, and the seed of every random order."""

    rows: tuple[int, ...]
    seconds: float
    seed: int


@dataclass
class Field:
    """Everybody who takes part, and why others do not."""

    openers: list[Opener] = field(default_factory=list)
    memory: list[Contender] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def warm(
    effort: Effort, place: Place, taking_part: Field, traces: dict[str, Ints], progress: Progress
) -> dict[str, Any]:
    """Rows/s with every page that is touched in the page cache, proven before and after."""
    files = sorted({file for opener in taking_part.openers for file in opener.files})
    fits = sum(file.stat().st_size for file in files) < (available_bytes() or 0) // 2
    pages = None if fits else np.unique(np.concatenate([place.starts(rows) // PAGE for rows in traces.values()]))
    with progress.task("read the files into the page cache"):
        before = min(make_warm(file, pages if file == place.path else None) for file in files)
    turns = ROUNDS * len(effort.rows) * len(traces) * (len(taking_part.openers) + len(taking_part.memory))
    turn_s = max(_LEAST_TURN_S, effort.seconds / turns)
    results = []
    with contextlib.ExitStack() as stack, progress.task("warm", turns, "turns") as task:
        contenders = [stack.enter_context(opener.open()) for opener in taking_part.openers] + taking_part.memory
        for trace, rows in traces.items():
            _touch(contenders, rows)
            for count in effort.rows:
                times = race(contenders, Trace(rows).draw, count, rounds=ROUNDS, turn_s=turn_s, seed=effort.seed,
                             task=task)  # fmt: skip
                results += [_figures(c, trace, count, times[c.name]) for c in contenders if c.name in times]
        after = resident_share(place.path, pages)
        contenders.clear()
    gc.collect()
    return {"resident_share_before": before, "resident_share_after": after, "rounds": ROUNDS, "results": results}


def _touch(contenders: Sequence[Contender], rows: Ints) -> None:
    """Once through the trace for every contender on a map, so that no page of it is mapped in or verified late."""
    for contender in contenders:
        if contender.maps:
            step = min(contender.most_rows, 16_384)
            for begin in range(0, len(rows), step):
                contender.call(rows[begin : begin + step])


def _figures(contender: Contender, trace: str, count: int, timing: Timing) -> dict[str, Any]:
    return {
        "name": contender.name, "kind": contender.kind, "limit": contender.limit, "trace": trace, "rows": count,
        "rows_per_second": count / timing.median, "us_per_call": 1e6 * timing.median, "calls": timing.calls,
        "turns": len(timing.seconds),
    }  # fmt: skip


def cold(
    effort: Effort, place: Place, taking_part: Field, traces: dict[str, Ints], progress: Progress
) -> dict[str, Any]:
    """Rows/s after the files were dropped from the page cache, proven before each measurement; and the device's."""
    by_name = {opener.name: opener for opener in taking_part.openers}
    times: dict[tuple[str, str, int], list[float]] = {}
    read: dict[tuple[str, str, int], list[int]] = {}
    pages: dict[tuple[str, int], list[float]] = {}
    kinds: dict[str, str] = {}
    ring = {trace: Trace(rows) for trace, rows in traces.items()}
    sweeps: list[dict[str, Any]] = []
    coldest, counted_by, rounds = 0.0, "", 0
    end = time.monotonic() + effort.seconds
    measurements = len(by_name) * len(traces) * len(effort.rows)
    with progress.task("cold", ROUNDS * measurements, "drops") as task:
        for number in range(ROUNDS):
            if number and time.monotonic() > end:
                break
            sweeps.append(device_probe.sweep(place.path, _PROBE_S, seed=effort.seed + number))
            for _, name in in_random_order(list(by_name), 1, effort.seed + number):
                for trace in traces:
                    for count in effort.rows:
                        opener = by_name[name]
                        gc.collect()
                        coldest = max(coldest, *(make_cold(file) for file in opener.files))
                        with opener.open() as contender:
                            kinds[name] = contender.kind
                            if count <= contender.most_rows:
                                key = (name, trace, count)
                                spent, bytes_read, share, counted_by = _cold_calls(contender, ring[trace], count, place)
                                pages.setdefault((trace, count), []).append(share)
                                times.setdefault(key, []).extend(spent)
                                read.setdefault(key, []).append(bytes_read)
                            del contender
                        task.advance()
            rounds += 1
    results = []
    for name, trace, count in itertools.product(by_name, traces, effort.rows):
        if (spent := times.get((name, trace, count), [])) == []:
            continue
        median, bytes_read = statistics.median(spent), sum(read[name, trace, count])
        results.append(
            {"name": name, "kind": kinds[name], "limit": False, "trace": trace, "rows": count,
             "rows_per_second": count / median, "us_per_call": 1e6 * median, "calls": len(spent),
             "device_bytes_per_row": bytes_read / (count * len(spent)),
             "pages_per_row": statistics.median(pages[trace, count])}
        )  # fmt: skip
    depths = sweeps[0]["reads_per_second"]
    rates = {depth: statistics.median(sweep["reads_per_second"][depth] for sweep in sweeps) for depth in depths}
    device = {"reads_per_second": rates, "best": max(rates.values()), "read_bytes": PAGE, "direct": sweeps[0]["direct"]}
    proof = {"resident_share_most": coldest, "proven_by": "mincore", "rounds": rounds, "bytes_counted_by": counted_by}
    return {"cold": {**proof, "results": results}, "device": device}


def _cold_calls(contender: Contender, trace: Trace, count: int, place: Place) -> tuple[list[float], int, float, str]:
    """Seconds of each call after one drop, bytes that they read from the device, distinct pages that one row takes."""
    calls = next((calls for most, calls in _COLD_CALLS if count <= most), 1)
    pieces = [fitting(contender, trace.draw(count)) for _ in range(calls)]
    before, _ = device_bytes(place.path)
    spent = []
    for ids in pieces:
        begin = time.perf_counter()
        contender.call(ids)
        spent.append(time.perf_counter() - begin)
    after, how = device_bytes(place.path)
    distinct = np.unique(np.concatenate(pieces) // place.rows_per_page)
    return spent, after - before, len(distinct) / (count * calls), how
