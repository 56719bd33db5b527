"""Hashing, and decoding with tables on the disk: those lines of the targets.

    python benchmarks/hash_decode.py [--package PKG] [--quick] [--out FILE.json] [--rounds 15] [--tokens 64]

Without a package, SmolLM2-135M gets two Engram layers with random int8 tables of at least 1 GiB together (16 rows of 64
values a token and layer). Hashing: ids of real text, 8,192 tokens a call, both layers. Decoding: prompt of real text,
greedy, rounds of every placement in random order; ratios are medians over the rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from outcome import Lines, Target, arguments, finish
from scratch_model import LAYERS, write_package

from engram.builders.fetch import cache_folder
from engram.runtime.bench_decode import BenchDecodeConfig, bench_decode
from engram.runtime.bench_hash import DEMO, OURS, BenchHashConfig, bench_hash
from engram.runtime.bench_report import last_level_cache

_ROW_BYTES = 68  # int8 of 64 values


def hash_targets(result: dict[str, Any]) -> list[Target]:
    """Ours against the demo's method, at every number of tokens a call; the bound is for the largest."""
    ours = [entry for entry in result["results"] if entry["name"] == OURS]
    top = max((entry["tokens"] for entry in ours), default=0)
    note = result["left_out"].get(DEMO, f"kernels {result['kernels']}")
    return [
        Target(f"hash, {entry['tokens']:,} tokens a call, against the published demo's method", ">= 30",
               entry["times_the_demo"], note)
        for entry in ours if entry["tokens"] == top
    ]  # fmt: skip


def decode_targets(result: dict[str, Any]) -> list[Target]:
    """Disk, warm and cold, against memory."""
    cold = f"at most {result['cold_resident_share_most']:.3%} resident"
    return [
        Target("decode, disk (warm) against RAM", ">= 0.98", result["ratios"]["disk_warm/ram"]["decode"]),
        Target("decode, disk (cold, proven) against RAM", ">= 0.93", result["ratios"]["disk_cold/ram"]["decode"], cold),
    ]  # fmt: skip


def measure(chosen: argparse.Namespace) -> list[Target]:
    """Every line, printed and written."""
    progress = Lines()
    table_bytes = 32 << 20 if chosen.quick else max(1 << 30, 20 * last_level_cache())
    (cache := cache_folder()).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-model-", dir=cache) as folder:
        with progress.task("write a package"):
            package = chosen.package or write_package(Path(folder), table_bytes // len(LAYERS) // _ROW_BYTES)
        hashed = bench_hash(
            BenchHashConfig(package, tokens=(1, 512, 8192), seconds=1.0 if chosen.quick else 20.0, seed=chosen.seed),
            progress,
        )
        decoded = bench_decode(
            BenchDecodeConfig(package, tokens=8 if chosen.quick else chosen.tokens,
                              rounds=2 if chosen.quick else chosen.rounds, seed=chosen.seed),
            progress,
        )  # fmt: skip
    method = {"words": __doc__, "table_bytes": table_bytes}
    found = hash_targets(hashed) + decode_targets(decoded)
    return finish("hash_decode", chosen, found, method, {"hash": hashed, "decode": decoded})


def parser() -> argparse.ArgumentParser:
    """The options of this script."""
    found = arguments(__doc__ or "")
    found.add_argument("--package", type=Path, help="a package of yours instead")
    found.add_argument("--rounds", type=int, default=15)
    found.add_argument("--tokens", type=int, default=64, help="to decode in a round")
    return found


if __name__ == "__main__":
    measure(parser().parse_args())
