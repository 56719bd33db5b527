"""Codecs chosen by a text: plans for `--frequent`, `--unseen`, `--drop-unseen` and `--tables auto`, and their price.

The text is parted by its documents' hashes: a few documents, of every fifth one, are held out to measure plans on; rows
are counted in all others. Equal texts lie on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram import Progress
from engram.builders.checkpoint import Checkpoint, open_checkpoint
from engram.builders.layout import Layout
from engram.builders.model import EngramModel
from engram.builders.token_cache import TokenCache
from engram.quantize.plan import TablePlan, frequent_plan
from engram.runtime.calibrate import CalibrateError, RowWeights, count_rows, with_openings
from engram.runtime.evaluate import Sample, choose
from engram.runtime.plan_search import check_budget, look_at, total_bytes, within_bytes, within_loss
from engram.runtime.quality import Judge, Window
from engram.runtime.quality_gate import context_of, float_model, windows_of
from engram.runtime.quantize_config import AUTO, QuantizeRun
from engram.runtime.row_sources import FloatTables, PlannedRows

_HELD_SHARE = 5  # of every fifth document some are held out
_LEAST_HELD = 2  # an interval over documents needs more than one
_OPENING_TOKENS = 8_192

Hashes = NDArray[np.uint64]
Plans = dict[int, TablePlan]


@dataclass(frozen=True)
class Choice:
    """The plan of every layer, what was traded (see `choose_plans`), and the hashes of all calibration documents."""

    plans: Plans
    traded: dict[str, Any]
    hashes: Hashes


def overlap(hashes_a: Hashes, hashes_b: Hashes) -> int:
    """How many different documents two texts share, by `TokenCache.hashes()`."""
    return len(np.intersect1d(hashes_a, hashes_b))


def choose_plans(config: QuantizeRun, progress: Progress, model: EngramModel | None = None) -> Choice:
    """Plans by what the calibration text shows, what was traded, as JSON, and the hashes of its documents:

        plans         by layer:
          classes       [{codec (None: not stored, reads as zeros), rows, bytes,
                        look_up_share: of the look-ups of the counted documents,
                        held_out_share: of those of the held-out ones, None where none is held out}]
          heads         the codec of each head's rows that no list names
          bytes         of the table's files: the classes' and the map's; bits_per_value
          seen_rows, seen_share   rows that the counted documents read; look_ups: how often they read one
          first_time_share        look-ups whose row was read that once only: Good and Turing's estimate of the share of
                        new text's look-ups that find a row unseen, which is what --unseen and --drop-unseen put at risk
                        (too low where a document repeats what only it says; held_out_share of the class is a count)
        table_bytes   of all layers
        calibration   documents, counted_documents, counted_tokens, documents_sha256 (over the sorted hashes of all)
        held_out      what the plans cost on documents that were not counted: change (nats a token), ci95 (over
                      documents), relative (to the float model's loss), tokens, documents. None where the text has too
                      few documents to hold some out
        tried         for --max-loss only, in order: table_bytes, change, ci95, relative, passed
        max_loss      for --max-loss only: asked, nats

    `model`: the checkpoint's float model, where it is open already.

    Raises what checkpoint and corpus raise, CalibrateError for a text that reads no row or has too few documents for a
    search, SearchError for a bound that cannot be met.
    """
    assert config.calibrate is not None
    checkpoint = open_checkpoint(config.checkpoint)
    layout = checkpoint.layout
    if config.budget is not None:
        check_budget(layout, config.budget, config.drop_unseen)
    rows = FloatTables(checkpoint)
    cache = TokenCache.build(config.calibrate, checkpoint.folder / "tokenizer.json", progress)
    try:
        hashes = cache.hashes()
        held = held_out(cache, config.search_tokens)
        if not held and config.tables == AUTO and config.budget is None:
            raise CalibrateError(
                f"the calibration text has {_different(cache)} different documents of at least 2 tokens; to search for "
                f"--max-loss {_HELD_SHARE * (_LEAST_HELD - 1) + 1} are needed, of which {_LEAST_HELD} are held out",
                hint="give --calibrate more documents (files, or lines of a .jsonl file), or give --budget SIZE",
            )
        counted = np.flatnonzero(~np.isin(hashes, hashes[held])).tolist()
        weights = count_rows(cache, layout, counted, progress)
        model = model or float_model(checkpoint)
        context = context_of(model)

        def windows(tokens: int, documents: Sequence[int], least: int) -> list[Window]:
            sample = Sample(tokens, documents=documents, least=least)
            return windows_of(checkpoint.folder, cache, sample, context)[0]

        opening = windows(_OPENING_TOKENS, counted, 1)
        apart = windows(config.search_tokens, held, _LEAST_HELD) if held else []
        told: dict[str, Any] = {"calibration": {
            "documents": cache.documents, "counted_documents": len(counted),
            "counted_tokens": int(cache.lengths()[counted].sum()),
            "documents_sha256": hashlib.sha256(np.sort(hashes).tobytes()).hexdigest(),
        }}  # fmt: skip
    finally:
        cache.discard()
    weights = with_openings(weights, Judge(model, rows, opening, progress))
    price = Price(Judge(model, rows, apart, progress), rows, config.seed) if apart else None
    plans, more = _chosen(config, checkpoint, rows, weights, price, progress)
    if price is None:
        progress.say("the calibration text has too few documents to hold some out: what the plans cost is not measured")
    told |= {
        "plans": {str(n): _told(plan, layout, n, weights[n], apart) for n, plan in plans.items()},
        "table_bytes": total_bytes(plans, layout), "held_out": None if price is None else price.of(plans), **more,
    }  # fmt: skip
    return Choice(plans, told, hashes)


def held_out(cache: TokenCache, tokens: int) -> list[int]:
    """Of every fifth different text, by hash, as many as `tokens` are read of; none where there are too few."""
    hashes, long = cache.hashes(), np.flatnonzero(cache.lengths() >= 2)
    _, first = np.unique(hashes[long], return_index=True)
    every = long[first][::_HELD_SHARE].tolist()
    if len(every) < _LEAST_HELD:
        return []
    return [document for document, _ in choose(cache, Sample(tokens, documents=every))]


class Price:
    """What plans cost on held-out documents; each is measured once."""

    def __init__(self, judge: Judge, rows: FloatTables, seed: int) -> None:
        self.judge, self.rows, self.seed = judge, rows, seed
        self._found: dict[tuple[str, ...], dict[str, Any]] = {}

    def of(self, plans: Mapping[int, TablePlan]) -> dict[str, Any]:
        """`held_out` of `choose_plans`."""
        judge = self.judge
        key = tuple(plan.fingerprint() for plan in plans.values())
        if key not in self._found:
            rows = PlannedRows(self.rows, judge.layout, plans)
            found = judge.change(judge.measure(rows, divergence=False, label="try a plan"), self.seed)
            self._found[key] = {
                "change": found["nll"], "ci95": found["ci95"], "relative": found["relative"],
                "tokens": len(judge.document_N), "documents": len(np.unique(judge.document_N)),
            }  # fmt: skip
        return self._found[key]


def _chosen(
    config: QuantizeRun, checkpoint: Checkpoint, rows: FloatTables, weights: Mapping[int, RowWeights],
    price: Price | None, progress: Progress,
) -> tuple[Plans, dict[str, Any]]:  # fmt: skip
    """The plans, and what a search tells of its way."""
    layout = checkpoint.layout
    if config.tables != AUTO:
        return {n: frequent_plan(
            config.tables, layout, (weights[n].rows_U, weights[n].weight_U), frequent=config.frequent,
            unseen=config.unseen, drop_unseen=config.drop_unseen,
        ) for n in layout.layers}, {}  # fmt: skip
    values = {layer: dense["value_proj.weight"] for layer, dense in checkpoint.dense().items()}
    tables = look_at(rows, layout, weights, values)
    if config.budget is not None:
        return within_bytes(tables, layout, config.budget, config.drop_unseen), {}
    assert config.max_loss is not None and price is not None
    nats = config.max_loss.nats(price.judge.loss(price.judge.float))
    tried: list[dict[str, Any]] = []

    def passes(plans: Mapping[int, TablePlan]) -> bool:
        found, size = price.of(plans), total_bytes(plans, layout)
        passed = bool(found["ci95"][1] <= nats)
        figures = {name: found[name] for name in ("change", "ci95", "relative")}
        tried.append({"table_bytes": size, **figures, "passed": passed})
        progress.say(
            f"{size / 1e6:,.1f} MB: loss {found['change']:+.5f} nats, 95 % up to {found['ci95'][1]:+.5f}, "
            f"{'within' if passed else 'beyond'} {nats:.5f}"
        )
        return passed

    bound = f"{config.max_loss} ({nats:.5f} nats)" if config.max_loss.relative else str(config.max_loss)
    plans = within_loss(tables, layout, config.drop_unseen, passes, bound, progress)
    return plans, {"tried": tried, "max_loss": {"asked": str(config.max_loss), "nats": nats}}


def _different(cache: TokenCache) -> int:
    return len(np.unique(cache.hashes()[cache.lengths() >= 2]))


def _told(
    plan: TablePlan, layout: Layout, layer: int, weight: RowWeights, apart: Sequence[Window]
) -> dict[str, Any]:
    """What a report says of one layer: codecs by rows, bytes and look-ups, and what the text covered."""
    told = plan.to_json(layout, layer)
    number = len(plan.codecs)
    read_K = np.bincount(plan.classes(weight.rows_U, layout, layer), weights=weight.reads_U, minlength=number)
    held_K = np.zeros(number)
    for window in apart:
        rows_N = layout.rows(window.ids_T[None])[layer].reshape(-1)
        held_K += np.bincount(plan.classes(rows_N, layout, layer), minlength=number)
    for k, entry in enumerate(told["classes"]):
        entry["look_up_share"] = float(read_K[k] / max(1, weight.reads))
        entry["held_out_share"] = float(held_K[k] / held_K.sum()) if apart else None
    return told | {
        "seen_rows": len(weight.rows_U), "seen_share": len(weight.rows_U) / layout.table_rows[layer],
        "look_ups": weight.reads, "first_time_share": float((weight.reads_U == 1).sum()) / max(1, weight.reads),
    }  # fmt: skip
