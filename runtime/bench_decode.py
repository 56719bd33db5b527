"""`engram bench decode`: what it costs that the tables lie on the disk: tokens/s beside the same model with them in
memory."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram import Progress
from engram.quantize.package import open_package
from engram.runtime import bench_trace
from engram.runtime.bench_race import BenchError, ParityError, in_random_order
from engram.runtime.coldness import device_bytes, make_cold, make_warm
from engram.runtime.engine import Model, Session
from engram.runtime.reader import RowReader

ARMS = {"none": "none", "ram": "ram", "disk_warm": "disk", "disk_cold": "disk"}  # arm: placement
_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class BenchDecodeConfig:
    """What `engram bench decode` needs to know."""

    package: Path
    prompt: str | None = None  # None: text of this Python
    tokens: int = 64  # to decode in a round
    rounds: int = 7
    arms: tuple[str, ...] = tuple(ARMS)
    seed: int = 0
    threads: int | None = None  # of torch; None: its own choice

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        if self.tokens < 1 or self.rounds < 1:
            raise BenchError(f"tokens {self.tokens} and rounds {self.rounds} must be at least 1")
        for arm in self.arms:
            if arm not in ARMS:
                raise BenchError(f"arm {arm!r} is not known", hint="use some of: " + ", ".join(ARMS))


@dataclass(frozen=True)
class _Run:
    tokens: list[int]
    prefill_s: float
    decode_s: float
    device_bytes: int


def bench_decode(config: BenchDecodeConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Interleaved rounds of every arm; the object of `engram bench decode --json`.

    Raises PackageError for what is no package, BenchError for a prompt that leaves no room, ParityError where two
    placements write different tokens, ColdnessError where the tables cannot be made cold or warm.
    """
    progress = progress or Progress()
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    models: dict[str, Model] = {}
    runs: dict[str, list[_Run]] = {arm: [] for arm in config.arms}
    coldest = 0.0
    try:
        for placement in dict.fromkeys(ARMS[arm] for arm in config.arms):
            with progress.task(f"open with tables in {placement}"):
                models[placement] = Model.open(config.package, offload=placement)
        prompt, source = _prompt(config, next(iter(models.values())), progress)
        with progress.task("decode", (1 + config.rounds) * len(config.arms), "rounds") as task:
            # The first round of every arm is not counted: it warms up torch, and shows whether all write the same.
            for number, arm in in_random_order(config.arms, 1 + config.rounds, config.seed):
                model, cold = models[ARMS[arm]], arm == "disk_cold"
                if ARMS[arm] == "disk":
                    models["disk"] = model = _opened_anew(model, config.package, cold=cold)
                run, share = _round(model, prompt, config.tokens, cold=cold)
                coldest = max(coldest, share)
                runs[arm].append(run)
                task.advance()
                if run.tokens != next(done[0].tokens for done in runs.values() if done):
                    raise ParityError(f"{arm} writes other tokens than the placement before it",
                                      hint="nothing was timed: engram verify may tell what is damaged")  # fmt: skip
    finally:
        for model in models.values():
            model.close()
    results = {arm: _figures(found[1:], len(prompt), config.tokens) for arm, found in runs.items()}
    return {
        "package": config.package, "prompt": source, "prompt_tokens": len(prompt), "tokens": config.tokens,
        "rounds": config.rounds, "parity": "every arm wrote the same tokens", "results": results,
        "cold_resident_share_most": coldest, "proven_by": "mincore",
        "ratios": {f"{arm}/{base}": _ratios(results, arm, base) for arm, base in
                   (("disk_warm", "ram"), ("disk_cold", "ram"), ("ram", "none")) if {arm, base} <= set(results)},
    }  # fmt: skip


def _prompt(config: BenchDecodeConfig, model: Model, progress: Progress) -> tuple[list[int], str]:
    room = model.context - config.tokens
    if config.prompt is None:
        texts, source = bench_trace.real_text(None, progress)
        ids = bench_trace.token_ids(config.package, texts, progress, min(_PROMPT_TOKENS, max(1, room))).tolist()
    else:
        ids, source = model.encode(config.prompt), "given"
    ids = [*model.begin(), *ids]
    if not ids or len(ids) > room:
        raise BenchError(
            f"a prompt of {len(ids)} tokens and {config.tokens} more do not fit: the model's context is "
            f"{model.context}",
            hint="pass another --prompt, or fewer --tokens",
        )
    return ids, source


def _opened_anew(model: Model, folder: Path, *, cold: bool) -> Model:
    """The same backbone and hot rows with tables just opened: cold ones proven not cached, warm ones cached."""
    files = [path for table in model.reader.tables.values() for path in table.paths]
    model.close()
    gc.collect()
    for file in files:
        make_cold(file) if cold else make_warm(file)
    fresh = copy.copy(model)
    fresh.package = open_package(folder)
    fresh.reader = RowReader(fresh.package, "disk", hot=model.reader.hot)
    return fresh


def _round(model: Model, prompt: list[int], tokens: int, *, cold: bool) -> tuple[_Run, float]:
    """Prefill, then decode greedily; before either, the tables of a cold arm are dropped and proven to be."""
    share = _drop(model) if cold else 0.0
    first = next(iter(model.reader.tables.values())).paths[0]
    read = device_bytes(first)[0]
    session: Session = model.session()
    begin = time.perf_counter()
    logits = session.feed(prompt)
    token = int(logits.argmax())
    prefill_s = time.perf_counter() - begin
    if cold:
        share = max(share, _drop(model))
    written = []
    begin = time.perf_counter()
    for _ in range(tokens):
        session.ask([token])
        written.append(token)
        token = int(session.feed([token]).argmax())
    decode_s = time.perf_counter() - begin
    return _Run(written, prefill_s, decode_s, device_bytes(first)[0] - read), share


def _drop(model: Model) -> float:
    shares = []
    for table in model.reader.tables.values():
        table.trim()
        shares += [make_cold(path) for path in table.paths]
    return max(shares)


def _figures(runs: list[_Run], prompt: int, tokens: int) -> dict[str, Any]:
    prefill, decode = [prompt / run.prefill_s for run in runs], [tokens / run.decode_s for run in runs]
    return {
        "prefill_tokens_per_second": statistics.median(prefill), "decode_tokens_per_second": statistics.median(decode),
        "device_bytes": statistics.median(run.device_bytes for run in runs),
        "decode_rounds": decode, "prefill_rounds": prefill,
    }  # fmt: skip


def _ratios(results: dict[str, dict[str, Any]], arm: str, base: str) -> dict[str, float]:
    """Median over the rounds of one arm's rate over the other's in the same round: what drifts, drifts for both."""
    return {
        part: statistics.median(
            ours / theirs
            for ours, theirs in zip(results[arm][f"{part}_rounds"], results[base][f"{part}_rounds"], strict=True)
        )
        for part in ("decode", "prefill")
    }
