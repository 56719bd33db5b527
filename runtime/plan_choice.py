"""Codecs chosen by a text: plans for `--frequent`, `--unseen`, `--drop-unseen` and `--tables auto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.token_cache import TokenCache
from engram.quantize.plan import TablePlan, frequent_plan
from engram.runtime.calibrate import RowWeights, count_rows, with_openings
from engram.runtime.evaluate import Sample
from engram.runtime.plan_search import look_at, total_bytes, within_bytes, within_loss
from engram.runtime.quality import Judge
from engram.runtime.quality_gate import context_of, float_model, windows_of
from engram.runtime.quantize_config import AUTO, QuantizeRun
from engram.runtime.row_sources import FloatTables, PlannedRows

_SEARCH_SHARE = 5  # every fifth calibration document is searched on, not counted
_OPENING_TOKENS = 8_192


def choose_plans(config: QuantizeRun, progress: Progress) -> tuple[dict[int, TablePlan], dict[str, Any]]:
    """Plans by what the calibration text shows, and what was traded.

    Raises what checkpoint and corpus raise, CalibrateError for a text that reads no row, SearchError for a bound that
    cannot be met.
    """
    assert config.calibrate is not None
    checkpoint = open_checkpoint(config.checkpoint)
    layout, rows = checkpoint.layout, FloatTables(checkpoint)
    cache = TokenCache.build(config.calibrate, checkpoint.folder / "tokenizer.json", progress)
    try:
        order = np.argsort(cache.hashes(), kind="stable")
        search = config.tables == AUTO and config.budget is None
        kept = [int(i) for place, i in enumerate(order) if not search or place % _SEARCH_SHARE]
        weights = count_rows(cache, layout, kept, progress)
        model = float_model(checkpoint)
        context = context_of(model)
        windows, _ = windows_of(checkpoint.folder, cache, Sample(_OPENING_TOKENS), context)
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
        far, _ = windows_of(checkpoint.folder, cache, Sample(None), context)
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
