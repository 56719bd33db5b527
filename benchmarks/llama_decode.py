"""Engram layers beside plain llama.cpp: decode and prefill of the same GGUF, the same threads, real text.

    python benchmarks/llama_decode.py [--quick] [--threads N]

For each backbone, two layers of random rows (heads, orders and width of recipes/attach-smollm2.yaml) on disk. Parity
first: every arm gives the same logits bit for bit. The text is fed, not sampled, so that all arms read the same rows
and none falls into repetition; each step ends with the argmax of the logits. Arms take turns every CHUNK tokens at the
same positions; a ratio is the median over the rounds of one arm's rate over the other's in the same round. The cold arm
has tables of its own, dropped before prefill and again before decoding, proven by mincore.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import outcome
from outcome import Lines, Target, say
from scratch_model import write_gguf_package

from engram.builders.fetch import GEMMA3_GGUF, SMOLLM2_GGUF
from engram.runtime import bench_trace
from engram.runtime.bench_race import ParityError, in_random_order
from engram.runtime.coldness import make_cold, make_warm
from engram.runtime.llama import LlamaSlots
from engram.runtime.llama_hook import library
from engram.runtime.slots import Feed

CHUNK, CHUNKS, ROUNDS, PREFILL, ROWS = 16, 4, 9, 512, 2_000_000
CASES = {  # backbone, layers, width of the convolution
    "SmolLM2-135M Q4_1": (SMOLLM2_GGUF, (2, 15), 0),
    "SmolLM2-135M Q4_1, convolution": (SMOLLM2_GGUF, (2, 15), 4),
    "Gemma-3-270M Q4_K_M": (GEMMA3_GGUF, (2, 9), 0),
}


class Ours:
    """Slots of the product."""

    def __init__(self, slots: LlamaSlots) -> None:
        self.slots = slots

    def feed(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits after the last of the ids."""
        feeds = [Feed(0, ids)]
        self.slots.ask(feeds)
        return self.slots.step(feeds)[0].numpy()

    def cut(self, length: int) -> None:
        """Back to this length."""
        self.slots._cut(0, length)

    def drop(self) -> float:
        """Tables out of the page cache; the share that is left, proven to be next to nothing."""
        shares = []
        for table in self.slots.reader.tables.values():
            table.trim()
            shares += [make_cold(path) for path in table.paths]
        return max(shares)


class Plain:
    """llama.cpp alone, over the same weights: no callback, no memory."""

    def __init__(self, slots: LlamaSlots, threads: int) -> None:
        self._c = library()
        options = self._c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = slots.context, slots.batch, slots.batch
        options.n_threads = options.n_threads_batch = threads
        options.kv_unified = options.swa_full = options.no_perf = True
        self._context = self._c.llama_init_from_model(slots._backbone.model, options)
        self._batch, self._length = self._c.llama_batch_init(slots.batch, 0, 1), 0
        self._out = np.empty(slots._backbone.vocab_size, dtype=np.float32)

    def feed(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits after the last of the ids."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self._length + i, 1, 0
            batch.seq_id[i][0] = 0
        batch.logits[len(ids) - 1] = 1
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._length += len(ids)
        found = self._c.llama_get_logits_ith(self._context, len(ids) - 1)
        ctypes.memmove(self._out.ctypes.data, found, self._out.nbytes)
        return self._out

    def cut(self, length: int) -> None:
        """Back to this length."""
        self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), 0, length, -1)
        self._length = length


def _timed(arm: Ours | Plain, ids: list[int]) -> float:
    begin = time.perf_counter()
    for token in ids:
        arm.feed([token]).argmax()
    return time.perf_counter() - begin


def measure(package: Path, text: list[int], threads: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds a token by arm and round, prefill and decode, and what the arms wrote."""
    options = {"context": 1024, "threads": threads}
    opened = {offload: LlamaSlots.open(package, offload=offload, **options) for offload in ("disk", "ram")}
    shutil.copytree(package, package.with_name("cold"))
    cold = LlamaSlots.open(package.with_name("cold"), offload="disk", **options)
    arms: dict[str, Ours | Plain] = {
        "plain": Plain(opened["disk"], threads), "disk_warm": Ours(opened["disk"]), "ram": Ours(opened["ram"]),
        "disk_cold": Ours(cold),
    }  # fmt: skip
    prompt, rest = text[:PREFILL], text[PREFILL : PREFILL + CHUNK * CHUNKS]
    logits = {}
    for name, arm in arms.items():
        arm.feed(prompt)
        logits[name] = arm.feed(rest[:1]).copy()
    if not (np.array_equal(logits["disk_warm"], logits["ram"]) and np.array_equal(logits["ram"], logits["disk_cold"])):
        raise ParityError("the placements give other logits", hint="nothing was timed")
    effect = float(np.abs(logits["ram"] - logits["plain"]).max())
    files = [path for table in opened["disk"].reader.tables.values() for path in table.paths]
    prefill: dict[str, list[float]] = {name: [] for name in arms}
    decode: dict[str, list[float]] = {name: [] for name in arms}
    coldest = 0.0

    def turn(names: list[str], work: Callable[[str], float], into: dict[str, list[float]]) -> None:
        for _, name in in_random_order(names, 1, len(into[names[0]]) + seed):
            into[name].append(work(name))

    for number in range(rounds):
        for file in files:
            make_warm(file)

        def read(name: str) -> float:
            arms[name].cut(0)
            begin = time.perf_counter()
            arms[name].feed(prompt).argmax()
            return time.perf_counter() - begin

        turn([name for name in arms if name != "disk_cold"], read, prefill)
        spent = dict.fromkeys(arms, 0.0)
        for part in range(CHUNKS):
            ids = rest[part * CHUNK : (part + 1) * CHUNK]
            warm = [name for name in arms if name != "disk_cold"]
            for _, name in in_random_order(warm, 1, number * CHUNKS + part + seed):
                spent[name] += _timed(arms[name], ids)
        cold_arm = arms["disk_cold"]
        assert isinstance(cold_arm, Ours)
        cold_arm.cut(0)
        coldest = max(coldest, cold_arm.drop())
        prefill["disk_cold"].append(read("disk_cold"))
        beside = arms["plain"]
        beside.cut(len(prompt))
        coldest = max(coldest, cold_arm.drop())
        spent["plain_beside_cold"] = 0.0
        for part in range(CHUNKS):
            ids = rest[part * CHUNK : (part + 1) * CHUNK]
            spent["disk_cold"] += _timed(cold_arm, ids)
            spent["plain_beside_cold"] += _timed(beside, ids)
        for name, seconds in spent.items():
            decode.setdefault(name, []).append(seconds / (CHUNK * CHUNKS))
        say(f"round {number + 1} of {rounds}")
    for slots in (*opened.values(), cold):
        slots.close()
    return {"effect_on_logits": effect, "cold_resident_share_most": coldest, "prefill_s": prefill,
            "decode_s_a_token": decode}  # fmt: skip


def _ratio(times: dict[str, list[float]], base: str, ours: str) -> float:
    return statistics.median(b / o for b, o in zip(times[base], times[ours], strict=True))


def main() -> None:
    """All cases."""
    parser = outcome.arguments(__doc__ or "")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", help="cases whose name holds this")
    chosen: argparse.Namespace = parser.parse_args()
    rounds, rows = (2, 20_000) if chosen.quick else (ROUNDS, ROWS)
    texts, source = bench_trace.real_text(None, Lines())
    targets, results = [], {}
    for name, (backbone, layers, conv) in CASES.items():
        if chosen.only and chosen.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            package = write_gguf_package(Path(folder), backbone, rows, layers=layers, conv=conv, seed=chosen.seed)
            ids = bench_trace.token_ids(package, texts, Lines(), PREFILL + CHUNK * CHUNKS).tolist()
            found = measure(package, ids, chosen.threads, rounds, chosen.seed)
            found["table_bytes"] = sum(file.stat().st_size for file in (package / "tables").iterdir())
        decode, prefill = found["decode_s_a_token"], found["prefill_s"]
        found["tokens_per_second"] = {arm: 1 / statistics.median(times) for arm, times in decode.items()}
        results[name] = found
        cold = _ratio(decode, "plain_beside_cold", "disk_cold")
        targets += [
            Target(f"{name}: decode, disk warm over plain", ">= 0.95", _ratio(decode, "plain", "disk_warm")),
            Target(f"{name}: decode, disk cold over plain", ">= 0.90", cold),
            Target(f"{name}: decode, disk warm over ram", ">= 0.98", _ratio(decode, "ram", "disk_warm")),
            Target(f"{name}: prefill of {PREFILL}, disk warm", ">= 0.92", _ratio(prefill, "plain", "disk_warm")),
        ]
    method = {"text": source, "prefill": PREFILL, "chunk": CHUNK, "chunks": CHUNKS, "rounds": rounds, "rows": rows,
              "threads": chosen.threads, "coldness": "mincore"}  # fmt: skip
    outcome.finish("llama_decode", chosen, targets, method, results)


if __name__ == "__main__":
    main()
