"""Rows of a table in memory: the in-memory lines of the targets.

    python benchmarks/rows_kernels.py [--quick] [--out FILE.json]

Tables of at least 1 GiB and 20 times the last-level cache, filled with encoded Gaussian rows; ids drawn evenly, fresh
for each call; all contenders of a format in one run, interleaved in random order, medians; one thread by the thread's
own CPU clock, two threads by wall clock; our outputs are reused, peers allocate where their interface does. Gate:
every contender equals its NumPy reference first, ours and ggml bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from outcome import Target, arguments, attempt, finish, say

from engram.kernels import dispatch
from engram.kernels.codecs import Codec, find_codec
from engram.runtime import bench_ggml, bench_kernels
from engram.runtime.bench_race import Contender, Timing, Trace, gate, race
from engram.runtime.bench_report import last_level_cache

ROUNDS, TURN_S = 13, 0.03
POOL = 1 << 21
GGUF_BOUNDS = {"q8_0": 0.45, "q4_0": 0.30, "iq4_nl": 0.25}


class Bench:
    """Sizes of this run, and what was measured so far."""

    def __init__(self, quick: bool, seed: int) -> None:
        self.table_bytes = 32 << 20 if quick else max(1 << 30, 20 * last_level_cache())
        self.rounds, self.turn_s = (3, 0.003) if quick else (ROUNDS, TURN_S)
        self.most_rows = 16_384 if quick else 131_072
        self.seed = seed
        self.results: dict[str, dict[int, dict[str, Any]]] = {}
        self.targets: list[Target] = []

    def batches(self, *wanted: int) -> list[int]:
        """Batch sizes of this run; a quick one leaves the largest out."""
        return [count for count in wanted if count <= self.most_rows]

    def ids(self, rows: int) -> Trace:
        """Fresh ids, drawn evenly."""
        return Trace(np.random.default_rng(self.seed + 7).integers(0, rows, POOL, dtype=np.int64))

    def run(
        self, name: str, rows: int, contenders: list[Contender], batches: Iterable[int],
        clock: Callable[[], float] = time.thread_time,
    ) -> dict[int, dict[str, Timing]]:
        """Gate, then race at every batch size."""
        trace = self.ids(rows)
        gate(contenders, trace.draw(min(64, *(contender.most_rows for contender in contenders))))
        found = {}
        for count in batches:
            found[count] = race(contenders, trace.draw, count, rounds=self.rounds, turn_s=self.turn_s, clock=clock,
                                seed=self.seed)  # fmt: skip
            self.results.setdefault(name, {})[count] = {
                who: {"us_per_call": 1e6 * timing.median, "million_rows_per_second": count / timing.median / 1e6}
                for who, timing in found[count].items()
            }
            words = [f"{who} {1e6 * timing.median:,.1f} µs" for who, timing in found[count].items()]
            say(f"{name} R={count:,}: " + ", ".join(words))
        return found

    def bound(
        self, what: str, times: dict[str, Timing], ours: str, theirs: str, bound: float, note: str = ""
    ) -> None:
        """Ours as a share of theirs, at most `bound`."""
        value = times[ours].median / times[theirs].median if theirs in times else None
        self.targets.append(Target(what, f"<= {bound}", value, note))


def formats(bench: Bench, width: int = 256) -> None:
    """int8-row, 4 bits and fp8 against the raw copy and against torch."""
    plan: list[tuple[str, float, str, float, int]] = [
        ("int8-row", 1.7, "torch embedding_bag_byte", 1.0, 8),
        ("int8", 1.7, "torch embedding_bag_byte", 1.0, 8),
        ("nf4", 2.3, "torch embedding_bag_4bit", 1.0, 4),
        ("q4_0", 2.3, "torch embedding_bag_4bit", 1.0, 4),
        ("fp8-e8m0", 2.5, "torch fp8 eager", 0.17, 0),
    ]
    for name, copy_bound, peer, peer_bound, bits in plan:
        codec = find_codec(name)
        rows = bench.table_bytes // codec.row_bytes(width)
        table = bench_kernels.random_table(codec, rows, width, bench.seed)
        most = bench.most_rows
        contenders = [bench_kernels.ours(codec, table, width, most), bench_kernels.raw_copy(table, most),
                      bench_kernels.ours(codec, table, width, most, bf16=True)]  # fmt: skip
        contenders += peers(bits, rows, table, width, most)
        found = bench.run(f"{name}, D={width}", rows, contenders, bench.batches(32, 512, 16_384, 131_072))
        own = f"engram {name}"
        # The line of int8 is for int8-row; the group codec is shown beside it, without a bound of its own.
        if name != "int8":
            for count in bench.batches(512, 16_384):
                bench.bound(f"{name} R={count:,} against raw copy", found[count], own, "raw copy", copy_bound)
                bench.bound(f"{name} R={count:,} against {peer}", found[count], own, peer, peer_bound)
            if name == "int8-row" and 131_072 in found:
                bench.bound(f"{name} R=131,072 against {peer}", found[131_072], own, peer, 0.25)
        del table, contenders
        gc.collect()


def peers(bits: int, rows: int, table: Any, width: int, most: int) -> list[Contender]:
    """torch's and FBGEMM's way to the same rows."""
    if not bits:
        makers = {"torch": lambda: bench_kernels.torch_fp8(table, width, most)}
    else:
        block = bench_kernels.random_block(width)
        packed = bench_kernels.tiled(bench_kernels.torch_packed(block, bits), rows)
        makers = {
            "torch": lambda: bench_kernels.torch_bag(packed, width, bits, most),
            "FBGEMM": lambda: bench_kernels.fbgemm(block, rows, bits, most),
        }
    found = [attempt(make, name)[0] for name, make in makers.items()]
    return [contender for contender in found if contender is not None]


def gguf(bench: Bench) -> None:
    """GGUF rows where they lie, in ggml's own memory, against ggml_get_rows."""
    for width in (160, 256):
        for name, bound in GGUF_BOUNDS.items():
            codec = find_codec(name)
            rows = bench.table_bytes // codec.row_bytes(width)
            block = codec.encode(bench_kernels.random_block(width, bench.seed))
            theirs, why = attempt(lambda: bench_ggml.Table(codec.name, block, rows, width), "ggml")  # noqa: B023
            if theirs is None:
                bench.targets.append(Target(f"{name} D={width} against ggml_get_rows", f"<= {bound}", None, why))
                continue
            most = bench.most_rows
            contenders = [bench_kernels.ours(codec, theirs.bytes_NK, width, most), theirs.contender(most),
                          bench_kernels.raw_copy(theirs.bytes_NK, most)]  # fmt: skip
            bit_equal(contenders[0], contenders[1], bench.ids(rows).draw(2048))
            found = bench.run(f"{name}, D={width}, in place", rows, contenders, bench.batches(512, 16_384, 131_072))
            for count, times in found.items():
                bench.bound(f"{name} D={width} R={count:,} against ggml_get_rows, bit-equal", times, f"engram {name}",
                            "ggml get_rows", bound)  # fmt: skip
            del contenders
            theirs.close()
            gc.collect()


def bit_equal(ours: Contender, theirs: Contender, ids: Any) -> None:
    """Stop where our bits are not the peer's."""
    mine = np.array(ours.call(ids)).view(np.uint32)
    if not np.array_equal(mine, np.array(theirs.call(ids)).view(np.uint32)):
        raise SystemExit(f"{ours.name} and {theirs.name} do not give the same bits")


def small_calls(bench: Bench, width: int = 256) -> None:
    """A whole Python call at R = 32: its time, what it allocates, and that it does not grow with the table."""
    codec = find_codec("int8-row")
    many, few = (1 << 16, 1 << 12) if bench.table_bytes < 1 << 30 else (1 << 20, 1 << 16)
    large = bench_kernels.random_table(codec, many, width)
    contenders = [bench_kernels.ours(codec, large, width, 32, name=f"{many:,} rows"),
                  bench_kernels.ours(codec, large[:few].copy(), width, 32, name=f"{few:,} rows")]  # fmt: skip
    contenders[1] = Contender(**{**vars(contenders[1]), "table_rows": few})
    times = bench.run("int8-row R=32, table sizes", many, contenders, [32])[32]
    bench.bound(f"time at {many:,} rows against {few:,} rows, R=32", times, contenders[0].name, contenders[1].name, 1.6)
    note = f"allocates {allocated(codec, large, width):,} bytes a call by tracemalloc; the rows are not in the caches"
    bench.targets.append(Target("a whole Python call at R=32, µs", "<= 10",
                                1e6 * times[contenders[0].name].median, note))  # fmt: skip
    bench.targets.append(Target("allocated by a call at R=32, bytes that grow with R or D", "<= 0",
                                grows(codec, large, width)))  # fmt: skip


def allocated(codec: Codec, table: Any, width: int, rows: int = 32) -> int:
    """The most that one call holds beyond what was there, by tracemalloc: views and numbers, no arrays."""
    contender = bench_kernels.ours(codec, table, width, rows)
    ids = np.arange(rows, dtype=np.int64)
    for _ in range(5):
        contender.call(ids)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        contender.call(ids)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def grows(codec: Codec, table: Any, width: int) -> float:
    """How much more one call allocates for 2,048 rows than for 32: nothing, where only views are made."""
    return float(max(0, allocated(codec, table, width, 2048) - allocated(codec, table, width, 32)))


def two_threads(bench: Bench, width: int = 256, count: int = 16_384) -> None:
    """Two threads against one, by wall clock."""
    for name in ("int8-row", "int8", "fp8-e8m0"):
        codec = find_codec(name)
        rows = bench.table_bytes // codec.row_bytes(width)
        table = bench_kernels.random_table(codec, rows, width, bench.seed)
        contenders = [bench_kernels.ours(codec, table, width, count, threads=threads, name=f"{threads} threads")
                      for threads in (1, 2)]  # fmt: skip
        times = bench.run(f"{name}, one and two threads", rows, contenders, [count], time.perf_counter)[count]
        value = times["1 threads"].median / times["2 threads"].median
        bench.targets.append(Target(f"{name} R={count:,}, two threads against one", ">= 1.2", value))
        del table, contenders
        gc.collect()


def measure(chosen: argparse.Namespace) -> list[Target]:
    """Every line, printed and written."""
    bench = Bench(chosen.quick, chosen.seed)
    say(f"kernels {dispatch.name()}, tables of {bench.table_bytes / 1e9:.2f} GB")
    formats(bench)
    gguf(bench)
    small_calls(bench)
    two_threads(bench)
    method = {"table_bytes": bench.table_bytes, "rounds": bench.rounds, "turn_s": bench.turn_s, "words": __doc__,
              "clock": "thread CPU time for one thread, wall for two", "kernels": dispatch.name()}  # fmt: skip
    return finish("rows_kernels", chosen, bench.targets, method, bench.results)


if __name__ == "__main__":
    measure(arguments(__doc__ or "").parse_args())
