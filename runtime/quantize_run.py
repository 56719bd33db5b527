"""The whole of `engram quantize`: look at a text, choose codecs, write, and let the gate judge what was written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engram import EngramError, Progress
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.token_cache import TokenCache
from engram.kernels.codecs import find_codec
from engram.quantize.folder import check_target
from engram.quantize.plan import TablePlan, frequent_plan
from engram.quantize.tables import QuantizeConfig, QuantizeError, quantize
from engram.runtime.calibrate import RowWeights, count_rows, with_openings
from engram.runtime.evaluate import Sample
from engram.runtime.plan_search import look_at, total_bytes, within_bytes, within_loss
from engram.runtime.quality import Judge
from engram.runtime.quality_gate import (
    Bound,
    QualityConfig,
    float_model,
    judge_quantized,
    remove_candidate,
    settle,
    windows_of,
)
from engram.runtime.row_sources import FloatRows, PlannedRows

AUTO = "auto"
_SEARCH_SHARE = 5  # every fifth calibration document is searched on, not counted
_OPENING_TOKENS = 8_192


@dataclass(frozen=True)
class QuantizeRun:
    """What to do; see `engram quantize --help` for each field.

    `frequent` is a codec and the share of the seen rows that get it. `search_tokens` of the calibration text are what
    `auto` measures its plans on.
    """

    checkpoint: Path
    out: Path
    tables: str = "int8"
    calibrate: CorpusConfig | None = None
    frequent: tuple[str, float] | None = None
    unseen: str | None = None
    drop_unseen: bool = False
    budget: int | None = None
    max_loss: Bound | None = None
    gate: CorpusConfig | None = None
    gate_tokens: int = 16_384
    search_tokens: int = 8_192
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, before anything is read."""
        if self.tables != AUTO:
            find_codec(self.tables)
        for codec in (self.frequent[0] if self.frequent else None, self.unseen):
            if codec is not None:
                find_codec(codec)
        wants_text = self.tables == AUTO or self.frequent or self.unseen or self.drop_unseen
        rules = [
            (wants_text and self.calibrate is None, "how often rows are read is known only from a text",
             "give --calibrate TEXT"),
            (self.calibrate is not None and not wants_text, "--calibrate is given, but nothing uses it",
             "add --tables auto, --frequent, --unseen or --drop-unseen"),
            (self.unseen is not None and self.drop_unseen, "--unseen and --drop-unseen contradict one another", ""),
            (self.tables == AUTO and (self.frequent or self.unseen), "--tables auto chooses codecs for all rows itself",
             "leave --frequent and --unseen out"),
            (self.tables == AUTO and self.budget is None and self.max_loss is None, "--tables auto needs a bound",
             "give --budget 2GB or --max-loss 0.5%"),
            (self.tables != AUTO and self.budget is not None, "--budget is for --tables auto", ""),
            (self.tables != AUTO and self.max_loss is not None and self.gate is None,
             "--max-loss needs a text to measure the loss on", "give --gate TEXT"),
        ]  # fmt: skip
        for broken, message, hint in rules:
            if broken:
                raise QuantizeError(message, hint=hint)


def quantize_run(config: QuantizeRun, progress: Progress | None = None) -> dict[str, Any]:
    """Returns the fields of `engram quantize --json`; `passed` is False where the gate refused and kept aside.

    Raises what the parts raise; then nothing appears under `out`.
    """
    begin = time.monotonic()
    seen = progress or Progress()
    check_target(config.checkpoint, config.out, force=config.force, error=QuantizeError)
    checkpoint = open_checkpoint(config.checkpoint)
    traded: dict[str, Any] = {}
    plans = None
    if config.calibrate is not None:
        plans, traded = _choose(checkpoint, config, seen)
    codec = "mixed" if config.tables == AUTO else config.tables
    work = QuantizeConfig(config.checkpoint, config.out, tables=codec, plans=plans, force=config.force)
    if config.gate is None:
        result = quantize(work, seen)
    else:
        candidate = config.out.with_name(config.out.name + ".candidate")
        try:
            result = quantize(replace(work, out=candidate, force=True), seen)
            quality = QualityConfig(config.gate, config.max_loss, config.gate_tokens, seed=config.seed)
            report = judge_quantized(config.checkpoint, candidate, quality, seen)
            place = settle(candidate, config.out, report)
        except EngramError:
            remove_candidate(candidate)
            raise
        result |= {"out": str(place), "quality": report, "passed": report.get("passed", True)}
    return result | traded | {"seconds": time.monotonic() - begin}


def _choose(
    checkpoint: Checkpoint, config: QuantizeRun, progress: Progress
) -> tuple[dict[int, TablePlan], dict[str, Any]]:
    """Plans by what the calibration text shows, and what was traded."""
    assert config.calibrate is not None
    layout, rows = checkpoint.layout, FloatRows(checkpoint)
    cache = TokenCache.build(config.calibrate, checkpoint.folder / "tokenizer.json", progress)
    try:
        order = np.argsort(cache.hashes(), kind="stable")
        search = config.tables == AUTO and config.budget is None
        kept = [int(i) for place, i in enumerate(order) if not search or place % _SEARCH_SHARE]
        weights = count_rows(cache, layout, kept, progress)
        model = float_model(checkpoint)
        windows, _ = windows_of(checkpoint.folder, cache, Sample(_OPENING_TOKENS), 1 << 30)
        counted = set(kept)
        judge = Judge(model, rows, [w for w in windows if w.document in counted] or windows, progress)
        weights = with_openings(weights, judge)
        if not config.tables == AUTO:
            plans = {n: _frequent(config, checkpoint, n, weights[n]) for n in layout.layers}
            return plans, {"plans": _told(plans, checkpoint, weights)}
        tables = look_at(rows, layout, weights, _values(checkpoint))
        if not search:
            assert config.budget is not None
            plans = within_bytes(tables, layout, config.budget, config.drop_unseen)
            return plans, {"plans": _told(plans, checkpoint, weights), "table_bytes": total_bytes(plans, layout)}
        assert config.max_loss is not None
        bound = config.max_loss
        far, _ = windows_of(checkpoint.folder, cache, Sample(None), 1 << 30)
        apart = [w for w in far if w.document not in counted]
    finally:
        cache.discard()
    tried: list[dict[str, Any]] = []
    judge = Judge(model, rows, _at_most(apart, config.search_tokens), progress)
    nats = bound.nats(judge.loss(judge.float))

    def passes(plans: Mapping[int, TablePlan]) -> bool:
        measured = judge.measure(PlannedRows(rows, layout, plans), divergence=False, label="try a plan")
        change = judge.change(measured, config.seed)
        size = total_bytes(plans, layout)
        tried.append({"table_bytes": size, "change": change})
        progress.say(f"{size / 1e6:,.1f} MB: loss {change['nll']:+.5f} nats, 95 % up to {change['ci95'][1]:+.5f}")
        return bool(change["ci95"][1] <= nats)

    plans = within_loss(tables, layout, config.drop_unseen, passes, progress)
    told = {"plans": _told(plans, checkpoint, weights), "table_bytes": total_bytes(plans, layout), "tried": tried}
    return plans, told


def _frequent(config: QuantizeRun, checkpoint: Checkpoint, layer: int, weight: RowWeights) -> TablePlan:
    return frequent_plan(
        config.tables, checkpoint.layout, (weight.rows_U, weight.weight_U), frequent=config.frequent,
        unseen=config.unseen, drop_unseen=config.drop_unseen,
    )  # fmt: skip


def _values(checkpoint: Checkpoint) -> dict[int, Any]:
    """Each layer's value projection [H, E]."""
    return {layer: dense["value_proj.weight"] for layer, dense in checkpoint.dense().items()}


def _at_most(windows: list[Any], tokens: int) -> list[Any]:
    """Windows spread over all of them, of about that many tokens."""
    total = sum(len(w.ids_T) for w in windows)
    step = max(1, round(total / max(1, tokens)))
    return windows[::step]


def _told(
    plans: Mapping[int, TablePlan], checkpoint: Checkpoint, weights: Mapping[int, RowWeights]
) -> dict[str, dict[str, Any]]:
    """What a report says of the plans: codecs by rows, and what the text covered."""
    told = {}
    for layer, plan in plans.items():
        rows = checkpoint.layout.table_rows[layer]
        weight = weights[layer]
        told[str(layer)] = plan.to_json(checkpoint.layout, layer) | {
            "seen_rows": len(weight.rows_U), "seen_share": len(weight.rows_U) / rows, "look_ups": weight.reads,
            "first_time_share": float((weight.reads_U == 1).sum()) / max(1, weight.reads),
        }  # fmt: skip
    return told
