"""`engram bench rows`: how fast a package's table gives rows, warm and cold, beside what memory and device allow.

Shape letters: N rows, K bytes a row, D width, R rows of a call.
"""

from __future__ import annotations

import gc
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.fetch import cache_folder
from engram.builders.process_memory import available_bytes
from engram.kernels import dispatch
from engram.kernels.codecs import Codec, find_codec
from engram.quantize.mapped import MappedTable
from engram.quantize.package import open_package
from engram.runtime import bench_files, bench_ggml, bench_kernels, bench_trace
from engram.runtime.bench_files import Place
from engram.runtime.bench_race import BenchError, Contender, Ints, ParityError, gate
from engram.runtime.bench_states import Effort, Field, cold, warm

PEERS = ("numpy", "torch", "engramdb", "fbgemm", "ggml")
_GATE_ROWS = 64
_UNIFORM_ROWS = 1 << 21


@dataclass(frozen=True)
class BenchRowsConfig:
    """What `engram bench rows` needs to know."""

    package: Path
    text: Path | None = None
    rows: tuple[int, ...] = (32, 512, 16_384, 131_072)
    warm: bool = True
    cold: bool = True
    seconds: float = 30.0  # to measure for, each of warm and cold
    threads: int = 1
    layer: int | None = None  # None: the first
    peers: tuple[str, ...] | None = None  # None: all that are installed
    backends: tuple[str, ...] = ("auto",)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if not self.rows or min(self.rows) < 1:
            raise BenchError(f"rows {list(self.rows)} must be numbers of at least 1")
        if not (self.warm or self.cold):
            raise BenchError("neither warm nor cold is to be measured", hint="leave out one of --no-warm and --no-cold")
        if self.seconds <= 0 or self.threads < 1:
            raise BenchError(f"seconds {self.seconds} must be above 0 and threads {self.threads} at least 1")
        for name in self.peers or ():
            if name not in PEERS:
                raise BenchError(f"peer {name!r} is not known", hint="use some of: " + ", ".join(PEERS))


def bench_rows(config: BenchRowsConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Gate, then time; the object of `engram bench rows --json` without machine and versions.

    Raises PackageError for what is no package, BenchError for settings that do not fit it, ParityError where a
    contender's rows are wrong, ColdnessError where warm or cold cannot be proven.
    """
    progress = progress or Progress()
    os.environ["ENGRAM_THREADS"] = str(config.threads)
    texts, source = bench_trace.real_text(config.text, progress)
    with open_package(config.package) as package:
        layer = package.layout.layers[0] if config.layer is None else config.layer
        if layer not in package.layers:
            raise BenchError(f"layer {layer} has no table", hint=f"the package has layers {sorted(package.layers)}")
        ids = bench_trace.token_ids(config.package, texts, progress)
        traces = {"text": bench_trace.text_rows(package.layout, layer, ids)}
        table = package.layers[layer]
        if not isinstance(table, MappedTable):
            raise BenchError(f"layer {layer} lies in foreign files or mixes codecs; only packed table files of one "
                             "codec are measured", hint="make a packed package: engram export")  # fmt: skip
        place, codec, width = Place.of(table), table.codec, table.width
        io = {"name": table.io, "why": table.why}
    traces["uniform"] = bench_trace.uniform_rows(place.rows, _UNIFORM_ROWS, config.seed)
    result: dict[str, Any] = {
        "package": config.package, "text": {"source": source, "tokens": len(ids)}, "kernels": dispatch.name(),
        "table": {"file": place.path.name, "layer": layer, "codec": codec.name, "rows": place.rows, "width": width,
                  "row_bytes": place.row_bytes, "bytes": place.path.stat().st_size},
        "io": io, "threads": config.threads,
    }  # fmt: skip
    return result | measure(config, place, codec, width, traces, progress)


def measure(
    config: BenchRowsConfig, place: Place, codec: Codec, width: int, traces: dict[str, Ints], progress: Progress
) -> dict[str, Any]:
    """The gate and every measurement of one table file; fields `parity`, `warm`, `cold`, `device`, `left_out`."""
    (cache := cache_folder()).mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    effort = Effort(config.rows, config.seconds, config.seed)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=cache) as scratch:
        taking_part = _field(config, place, codec, width, Path(scratch), progress)
        result["parity"] = _gate(taking_part, place, traces, progress)
        if config.warm:
            result["warm"] = warm(effort, place, taking_part, traces, progress)
        if config.cold:
            result |= cold(effort, place, taking_part, traces, progress)
        result["left_out"] = taking_part.left_out
    return result


def _field(
    config: BenchRowsConfig, place: Place, codec: Codec, width: int, scratch: Path, progress: Progress
) -> Field:
    most = max(config.rows)
    found = Field(bench_files.our_openers(place, backends=config.backends, most_rows=most, threads=config.threads))
    room = available_bytes()
    rows = min(place.rows, max(1, (room or 1 << 62) // 8 // max(place.row_bytes, width + 8)))  # of tables in memory
    block_ids = np.arange(min(rows, 8192), dtype=np.int64)
    block = place.read(block_ids)
    values = codec.decode(block, width)
    values = np.clip(np.nan_to_num(values), -1e4, 1e4)  # what the peers' fp16 scales hold
    bits = 8 if 2 * place.row_bytes > width + 8 else 4

    def memory(contender: Contender, rows: int = rows) -> Contender:
        return Contender(**{**vars(contender), "table_rows": None if rows == place.rows else rows})

    raw_table = bench_kernels.tiled(block, rows)
    copy = bench_kernels.raw_copy(raw_table, most, threads=config.threads)
    found.memory.append(memory(Contender(**{**vars(copy), "kind": "raw"})))
    found.memory.append(memory(bench_kernels.ours(codec, raw_table, width, most, threads=config.threads,
                                                  name="engram, table in memory")))  # fmt: skip

    def numpy() -> None:
        found.openers.extend(bench_files.numpy_openers(place, most_rows=most))
        if not place.tight:
            found.left_out["numpy take(out=)"] = "rows do not fill their pages: it would copy the table at each call"
        found.memory.append(memory(bench_kernels.numpy_decode(codec, raw_table, width, most)))

    def torch() -> None:
        packed = bench_kernels.tiled(bench_kernels.torch_packed(values, bits), rows)
        found.memory.append(memory(bench_kernels.torch_bag(packed, width, bits, most, config.threads)))

    def engramdb() -> None:
        free = _free_bytes(scratch)
        if 3 * place.rows * place.row_bytes > free:
            raise BenchError(f"EngramDB needs two copies of the rows, {free:,} bytes are free in {scratch.parent}")
        found.openers.extend(bench_files.engramdb_openers(place, scratch / "engramdb", progress))

    def fbgemm() -> None:
        found.memory.append(memory(bench_kernels.fbgemm(values, rows, bits, most)))

    def ggml() -> None:
        if codec.name not in bench_ggml.TYPES:
            raise BenchError(f"ggml has no rows of {codec.name}")
        found.memory.append(memory(bench_ggml.Table(codec.name, block, rows, width).contender(most)))

    makers = {"numpy": numpy, "torch": torch, "engramdb": engramdb, "fbgemm": fbgemm, "ggml": ggml}
    for name in PEERS if config.peers is None else config.peers:
        try:
            makers[name]()
        except (BenchError, ImportError) as wrong:
            if config.peers is not None:
                raise BenchError(f"peer {name} cannot take part: {wrong}",
                                 hint=getattr(wrong, "hint", "")) from None  # fmt: skip
            found.left_out[name] = str(wrong)
    return found


def _free_bytes(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def _gate(taking_part: Field, place: Place, traces: dict[str, Ints], progress: Progress) -> dict[str, Any]:
    """Everybody's rows against the reference, on both traces and on the first and last rows."""
    names = []
    chosen = {name: rows[:_GATE_ROWS] for name, rows in traces.items()}
    chosen["first and last"] = np.array([0, place.rows - 1, 0, place.rows // 2], dtype=np.int64)
    with progress.task("parity", len(taking_part.openers) + len(taking_part.memory), "contenders") as task:
        for opener in taking_part.openers:
            with opener.open() as contender:
                _gate_one(contender, chosen)
            names.append(opener.name)
            task.advance()
        for contender in taking_part.memory:
            _gate_one(contender, chosen)
            names.append(contender.name)
            task.advance()
    gc.collect()
    return {"equal": names, "rows": sum(map(len, chosen.values()))}


def _gate_one(contender: Contender, chosen: dict[str, Ints]) -> None:
    for name, rows in chosen.items():
        try:
            gate([contender], rows)
        except ParityError as wrong:
            raise ParityError(f"{wrong} ({name} rows)", hint=wrong.hint) from None


def open_table(path: Path) -> tuple[Place, Codec, int]:
    """Place, codec and width of a table file, for benchmarks that have no package."""
    with MappedTable.open(path) as table:
        return Place.of(table), find_codec(table.codec.name), table.width
