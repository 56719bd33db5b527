"""Encoding rows, one thread: the encoder lines of the targets.

    python benchmarks/encode_rows.py [--quick] [--out FILE.json] [--width 256]

Gaussian rows of at least 256 MiB and four times the last-level cache; every call encodes the next 16 MiB of them, so
that no rows are in the caches; all contenders in one run, interleaved in random order, medians; one thread, by the
thread's own CPU clock. Every call of ours and of torch's allocates its output; the C library keeps what is freed, so
that nobody pays for fresh pages by luck (ggml's output is reused). Gate: ours equal the NumPy codecs bit for bit on
every path, ggml's Q8_0 and Q4_0 equal ours bit for bit, torch's lie within their own step. torch keeps one scale a row,
as our int8-row does; int8 has one for every 32 values.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from outcome import Target, arguments, attempt, finish, say

from engram.kernels import dispatch
from engram.kernels.codecs import CODECS, Bytes, Floats, find_codec
from engram.runtime import bench_ggml
from engram.runtime.bench_race import BenchError, in_random_order
from engram.runtime.bench_report import last_level_cache

ROUNDS, CALL_BYTES = 25, 16 << 20
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's mallopt
Call = Callable[[Floats], Any]


class GgmlQuantizer:
    """ggml_quantize_chunk of one type, into memory that is used again."""

    def __init__(self, codec: str, rows: int, width: int) -> None:
        self._ggml, self._type = bench_ggml.library(), bench_ggml.TYPES[codec]
        if not hasattr(self._ggml, "ggml_quantize_chunk"):
            raise BenchError("ggml cannot be used: this xllamacpp does not export ggml_quantize_chunk")
        number, pointer = ctypes.c_int64, ctypes.c_void_p
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self._out = np.empty((rows, find_codec(codec).row_bytes(width)), dtype=np.uint8)

    def __call__(self, rows: Floats) -> Bytes:
        out = self._out[: len(rows)]
        self._ggml.ggml_quantize_chunk(
            self._type, rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], None
        )  # fmt: skip
        return out


def torch_prepack(bits: int) -> Call:
    """torch's packing of an embedding table: bytes or 4 bits, one scale and one offset a row."""
    import torch

    torch.set_num_threads(1)
    packing = torch.ops.quantized.embedding_bag_byte_prepack if bits == 8 else (
        torch.ops.quantized.embedding_bag_4bit_prepack)  # fmt: skip
    return lambda rows: packing(torch.from_numpy(rows))


def torch_unpack(bits: int, packed: Any) -> Floats:
    """The values that torch reads back."""
    import torch

    unpacking = torch.ops.quantized.embedding_bag_byte_unpack if bits == 8 else (
        torch.ops.quantized.embedding_bag_4bit_unpack)  # fmt: skip
    values: Floats = unpacking(packed).numpy()
    return values


def contenders(rows: int, width: int) -> tuple[dict[str, Call], dict[str, str]]:
    """Ways to encode, by name, and why others are not there."""
    found: dict[str, Call] = {}
    missing = {}
    for name, codec in CODECS.items():
        if width % 32 and codec.group is not None and name in bench_ggml.TYPES:
            continue
        found[f"engram {name}"] = lambda block, codec=codec: dispatch.ops().encode(codec, block)  # type: ignore[misc]
    makers: dict[str, Callable[[], Call]] = {
        "torch byte_prepack": lambda: torch_prepack(8), "torch 4bit_prepack": lambda: torch_prepack(4),
        "ggml q8_0": lambda: GgmlQuantizer("q8_0", rows, width),
        "ggml q4_0": lambda: GgmlQuantizer("q4_0", rows, width),
    }  # fmt: skip
    for name, make in makers.items():
        made, why = attempt(make, name)
        if made is None:
            missing[name] = why
        else:
            found[name] = made
    encoded = find_codec("int8").encode(np.zeros((rows, width), dtype=np.float32))
    found["engram row_errors of int8"] = lambda block: dispatch.ops().row_errors(
        find_codec("int8"), encoded[: len(block)], block
    )
    return found, missing


def gate(calls: dict[str, Call], block: Floats) -> None:
    """Stop where bytes are not those of the NumPy codecs."""
    for path in dispatch.available():
        with dispatch.force(path):
            for name, codec in CODECS.items():
                ours = calls.get(f"engram {name}")
                if ours is not None and not np.array_equal(ours(block), codec.encode(block)):
                    raise SystemExit(f"{path}: {name} does not give the bytes of the NumPy codec: nothing was timed")
    for name in ("q8_0", "q4_0"):
        if f"ggml {name}" in calls and not np.array_equal(calls[f"ggml {name}"](block), find_codec(name).encode(block)):
            raise SystemExit(f"ggml's {name} and ours are not the same bytes: nothing was timed")
    for bits, name in ((8, "torch byte_prepack"), (4, "torch 4bit_prepack")):
        if name in calls:
            lost = np.abs(torch_unpack(bits, calls[name](block)) - block)
            step = (block.max(axis=1) - block.min(axis=1)) / (2**bits - 1)
            if not (lost <= 1.01 * step[:, None]).all():
                raise SystemExit(f"{name} loses more than its own step: nothing was timed")


def race(calls: dict[str, Call], table: Floats, count: int, rounds: int, seed: int) -> dict[str, float]:
    """Median seconds a call, by name."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    at = 0
    for number, name in in_random_order(list(calls), rounds + 1, seed):
        at = at + count if at + 2 * count <= len(table) else 0
        block = table[at : at + count]
        begin = time.thread_time()
        calls[name](block)
        if number:  # the first round warms up
            times[name].append(time.thread_time() - begin)
    return {name: statistics.median(found) for name, found in times.items()}


def keep_freed_memory() -> None:
    """Let the C library give no memory back, where it is glibc."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def measure(chosen: argparse.Namespace) -> list[Target]:
    """Every line, printed and written."""
    keep_freed_memory()
    width = chosen.width
    table_bytes = 64 << 20 if chosen.quick else max(256 << 20, 4 * last_level_cache())
    rounds, count = (3 if chosen.quick else ROUNDS), CALL_BYTES // (4 * width)
    table = np.random.default_rng(chosen.seed).standard_normal((table_bytes // (4 * width), width), dtype=np.float32)
    table *= np.float32(0.02)
    calls, missing = contenders(count, width)
    gate(calls, table[:2048])
    results: dict[str, dict[str, Any]] = {}
    for path in [name for name in dispatch.available() if name != "reference"] or ["reference"]:
        with dispatch.force(path):
            found = race(calls, table, count, rounds, chosen.seed)
        results[path] = {
            name: {"million_bytes_of_float32_per_second": 4 * width * count / seconds / 1e6,
                   "million_rows_per_second": count / seconds / 1e6}
            for name, seconds in found.items()
        }  # fmt: skip
        rates = [f"{name} {row['million_bytes_of_float32_per_second']:,.0f}" for name, row in results[path].items()]
        say(f"{path}, MB of float32 a second: " + ", ".join(rates))
    best = results[next(iter(results))]
    targets = []
    for ours, theirs in (("int8-row", "torch byte_prepack"), ("int8", "torch byte_prepack"), ("q8_0", "ggml q8_0"),
                         ("nf4", "ggml q4_0"), ("q4_0", "ggml q4_0")):  # fmt: skip
        what = f"{ours} D={width}, one thread: speed against {theirs}"
        if theirs in best and f"engram {ours}" in best:
            speeds = [best[name]["million_rows_per_second"] for name in (f"engram {ours}", theirs)]
            targets.append(Target(what, ">= 1.0", speeds[0] / speeds[1]))
        else:
            targets.append(Target(what, ">= 1.0", None, missing.get(theirs, "the codec has no rows of this width")))
    method = {"table_bytes": table_bytes, "rows_a_call": count, "width": width, "rounds": rounds, "words": __doc__,
              "clock": "thread CPU time", "kernels": dispatch.name()}  # fmt: skip
    return finish("encode_rows", chosen, targets, method, results)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--width", type=int, default=256, help="values a row")
    measure(parser.parse_args())
