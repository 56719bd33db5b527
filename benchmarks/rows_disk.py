"""Rows of a table file, warm and cold: the mapped-file lines of the targets.

    python benchmarks/rows_disk.py [--quick] [--out FILE.json] [--plot FILE.png] [--seconds 120]

A table of raw 256-byte rows, at least 1 GiB and 20 times the last-level cache. Ids: those that real text asks for
(SmolLM2's tokenizer, a layout of that many rows) and, as the worst case, ids drawn evenly: the bounds are held against
the latter, and the former are shown beside them. Warm: every page proven resident (mincore). Cold: every file dropped
and proven absent before each measurement; the device limit is the best depth of a sweep of direct 4 KiB reads of the
same file in the same rounds. Copies of the rows in EngramDB's layout lie in the same cache folder.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from outcome import Lines, Target, arguments, finish, say
from scratch_model import smollm2_layout

from engram import EngramError
from engram.builders.fetch import cache_folder
from engram.kernels import dispatch
from engram.kernels.codecs import find_codec
from engram.quantize.mapped import MappedTable
from engram.quantize.row_store import RowWriter
from engram.runtime import bench_report, bench_rows, bench_trace
from engram.runtime.bench_files import our_openers
from engram.runtime.bench_race import BenchError
from engram.runtime.bench_rows import BenchRowsConfig
from engram.runtime.coldness import make_cold

WIDTH = 64  # float32: rows of 256 bytes
BACKENDS = ("auto", "mmap", "uring", "pread", "numpy")
OURS, COUNT = "engram, stored bytes", 16_384
_BLOCK = 1 << 16


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Random rows, each beginning with its own number, so that a wrong row is seen."""
    codec = find_codec("f32")
    block = np.random.default_rng(seed).integers(0, 256, (_BLOCK, 4 * WIDTH), dtype=np.uint8)
    with RowWriter(path, rows, WIDTH, codec, 1) as writer:
        for begin in range(0, rows, _BLOCK):
            part = block[: min(_BLOCK, rows - begin)]
            part[:, :8] = np.arange(begin, begin + len(part), dtype="<u8").view(np.uint8).reshape(-1, 8)
            writer.append(part)


def possible_backends(path: Path) -> tuple[str, ...]:
    """Those that this system has, "auto" first."""
    found = []
    for io in BACKENDS:
        try:
            MappedTable.open(path, io=io).close()
            found.append(io)
        except EngramError as wrong:
            say(f"left out: back end {io}: {wrong}")
    return tuple(found)


def file_peers() -> tuple[str, ...]:
    """Peers that read files, of those that are installed."""
    return ("numpy", "engramdb") if find_spec("engramdb") is not None else ("numpy",)


def first_touch_share(path: Path, rows: int, rounds: int, count: int, seed: int) -> dict[str, Any]:
    """How much of a cold call is the comparing of checksums: with and without, in turns, after proven drops."""
    place, _, _ = bench_rows.open_table(path)
    draw = np.random.default_rng(seed)
    wall: dict[str, list[float]] = {"first-touch": [], "off": []}
    cpu: dict[str, list[float]] = {"first-touch": [], "off": []}
    for number in range(rounds):
        for verify in ("first-touch", "off") if number % 2 else ("off", "first-touch"):
            opener = our_openers(place, backends=("auto",), most_rows=count, verify=verify)[0]
            ids = draw.integers(0, rows, count, dtype=np.int64)
            gc.collect()
            make_cold(path)
            with opener.open() as contender:
                begin, begin_cpu = time.perf_counter(), time.process_time()
                contender.call(ids)
                wall[verify].append(time.perf_counter() - begin)
                cpu[verify].append(time.process_time() - begin_cpu)
                del contender
    medians = {verify: statistics.median(times) for verify, times in wall.items()}
    busy = {verify: statistics.median(times) for verify, times in cpu.items()}
    return {
        "rows": count, "rounds": rounds, "seconds": medians, "cpu_seconds": busy, "all_seconds": wall,
        "share": 1 - medians["off"] / medians["first-touch"],
        "cpu_share": (busy["first-touch"] - busy["off"]) / medians["first-touch"],
    }  # fmt: skip


def rate(result: dict[str, Any], state: str, name: str, trace: str, count: int) -> float | None:
    """Rows a second of the contender whose name begins so; of several, the best."""
    found = [
        entry["rows_per_second"] for entry in result[state]["results"]
        if entry["name"].startswith(name) and entry["trace"] == trace and entry["rows"] == count
    ]  # fmt: skip
    return max(found) if found else None


def quotient(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def lines(result: dict[str, Any], share: dict[str, Any], count: int) -> list[Target]:
    """The targets, against ids drawn evenly; the same of real text beside them."""
    found = []
    for trace in ("uniform", "text"):
        words = f"R={count:,}, {trace} rows"
        own = {entry["rows"]: entry for entry in result["cold"]["results"]
               if entry["name"] == OURS and entry["trace"] == trace}  # fmt: skip
        warm, cold = rate(result, "warm", OURS, trace, count), own[count]["rows_per_second"]
        # What the device could give of this trace: its best rate, over the distinct pages that a row takes.
        limit = result["device"]["best"] / own[count]["pages_per_row"]
        found += [
            Target(f"warm, {words}: against numpy.take(out=) on the map", ">= 1.2",
                   quotient(warm, rate(result, "warm", "numpy take(out=)", trace, count))),
            Target(f"warm, {words}: against EngramDB's best", ">= 10",
                   quotient(warm, rate(result, "warm", "EngramDB", trace, count))),
            Target(f"cold, {words}: against the device's best rate", ">= 0.8", cold / limit,
                   f"{own[count]['pages_per_row']:.3f} pages a row"),
            Target(f"cold, {words}: against numpy.memmap with random advice", ">= 4",
                   quotient(cold, rate(result, "cold", "numpy memmap", trace, count))),
            Target(f"cold, {words}: against EngramDB's best", ">= 1.0",
                   quotient(cold, rate(result, "cold", "EngramDB", trace, count))),
            Target(f"cold, {words}: bytes read from the device a row", "<= 4200", own[count]["device_bytes_per_row"]),
        ]  # fmt: skip
    note = f"cold R={share['rows']:,}, {share['rounds']} pairs; by CPU time {share['cpu_share']:.3f}"
    found.append(Target("first-touch verification, share of a cold call", "<= 0.03", share["share"], note))
    return found


def measure(chosen: argparse.Namespace) -> list[Target]:
    """Every line, printed and written."""
    table_bytes = 32 << 20 if chosen.quick else max(1 << 30, 20 * bench_report.last_level_cache())
    layout, tokenizer = smollm2_layout(table_bytes // (4 * WIDTH), WIDTH)
    rows = layout.table_rows[layout.layers[0]]
    progress = Lines()
    if chosen.plot is not None:
        bench_report.check_plot(chosen.plot)
    (cache := cache_folder()).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-table-", dir=cache) as folder:
        path = Path(folder) / "layer-01.safetensors"
        write_rows(path, rows, chosen.seed)
        texts, source = bench_trace.real_text(None, progress)
        ids = bench_trace.token_ids(tokenizer, texts, progress)
        traces = {
            "text": bench_trace.text_rows(layout, layout.layers[0], ids),
            "uniform": bench_trace.uniform_rows(rows, 1 << 21, chosen.seed),
        }
        config = BenchRowsConfig(
            package=Path(folder), rows=(32, 512, COUNT), seconds=3.0 if chosen.quick else chosen.seconds,
            peers=file_peers(), backends=possible_backends(path), seed=chosen.seed,
        )  # fmt: skip
        place, codec, width = bench_rows.open_table(path)
        result = bench_rows.measure(config, place, codec, width, traces, progress)
        share = first_touch_share(path, rows, 3 if chosen.quick else 15, COUNT, chosen.seed)
    result["table"] = {"codec": codec.name, "rows": rows, "width": width, "row_bytes": place.row_bytes,
                       "bytes": table_bytes}  # fmt: skip
    for name, why in result["left_out"].items():
        say(f"left out: {name}: {why}")
    if chosen.plot is not None:
        bench_report.save_plot(chosen.plot, result)
    method = {"words": __doc__, "text": source, "tokens": len(ids), "kernels": dispatch.name(),
              "seconds": config.seconds}  # fmt: skip
    return finish("rows_disk", chosen, lines(result, share, COUNT), method, result | {"first_touch": share})


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    found = arguments(__doc__ or "")
    found.add_argument("--plot", type=Path, help="draw rows/s over batch size into this PNG")
    found.add_argument("--seconds", type=float, default=120.0, help="to measure for, warm and cold each")
    return found


if __name__ == "__main__":
    try:
        measure(parser().parse_args())
    except BenchError as wrong:
        raise SystemExit(f"error: {wrong}") from None
