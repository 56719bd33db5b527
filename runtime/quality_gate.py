"""The gate: a quantized checkpoint is run against its float one, and the verdict is written into its manifest.

What passes appears under its name; what does not is kept aside as NAME.rejected, marked: `engram export` refuses it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram import Progress
from engram.builders.atomic import put_in_place, sync_path, write_whole
from engram.builders.backbone import BackboneRef, load_backbone
from engram.builders.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from engram.builders.corpus import CorpusConfig
from engram.builders.engram import GateConfig
from engram.builders.model import EngramModel, load_gate_weights
from engram.builders.token_cache import TokenCache
from engram.builders.tokenizer import special_tokens
from engram.quantize.package import open_source
from engram.runtime.evaluate import Sample, choose
from engram.runtime.quality import (
    Judge,
    Measured,
    Rows,
    Window,
    continuations,
    layers_of,
    shuffled_rows,
    zero_rows,
)
from engram.runtime.quantize_config import Bound, QualityError
from engram.runtime.readout import Readout
from engram.runtime.row_sources import FloatTables, StoredRows

DTYPE = "float32"  # of both backbones: bfloat16 rounds away what is to be measured


@dataclass(frozen=True)
class QualityConfig:
    """On what text to compare, and how much of it."""

    data: CorpusConfig
    max_loss: Bound | None = None
    max_tokens: int = 16_384
    document_tokens: int = 2048
    sequence: int = 512
    prompts: int = 16
    prompt_tokens: int = 48
    written_tokens: int = 48
    seed: int = 0


def float_model(checkpoint: Checkpoint, backbone: BackboneRef | None = None, beside: Path | None = None) -> EngramModel:
    """The checkpoint's gates on its own backbone or another, in float32; tables stay where they are."""
    gates = {n: GateConfig.from_json(config) for n, config in checkpoint.gates().items()}
    loaded = load_backbone(backbone or checkpoint.backbone, beside or checkpoint.folder, DTYPE)
    model = EngramModel(loaded, checkpoint.layout, gates).eval()
    load_gate_weights(model, checkpoint.dense())
    model.requires_grad_(False)
    return model


def windows_of(folder: Path, cache: TokenCache, sample: Sample, context: int) -> tuple[list[Window], str]:
    """The windows that an evaluation of this text would read, and the SHA-256 over their documents' hashes."""
    special = special_tokens(folder)
    bos = np.array([special["bos_id"]] if special.get("add_bos") else [], dtype=np.int64)
    chosen = choose(cache, sample)
    length = min(sample.sequence, context - len(bos))
    found = []
    for document, tokens in chosen:
        ids = cache.document(document)[:tokens].astype(np.int64)
        pieces = [np.concatenate([bos, ids[begin : begin + length]]) for begin in range(0, tokens, length)]
        found += [Window(document, piece) for piece in pieces if len(piece) >= 2]
    digest = hashlib.sha256(np.sort(cache.hashes()[[i for i, _ in chosen]]).tobytes()).hexdigest()
    return found, digest


def context_of(model: EngramModel) -> int:
    """Positions that the backbone was made for."""
    return int(getattr(model.backbone.config.get_text_config(), "max_position_embeddings", 1 << 30))


def read_windows(
    checkpoint: Checkpoint, config: QualityConfig, context: int, progress: Progress
) -> tuple[list[Window], str]:
    """The gate's windows."""
    cache = TokenCache.build(config.data, checkpoint.folder / "tokenizer.json", progress)
    try:
        sample = Sample(config.max_tokens, config.document_tokens, config.sequence)
        return windows_of(checkpoint.folder, cache, sample, context)
    finally:
        cache.discard()


def judge_quantized(
    checkpoint_folder: Path, quantized: Path, config: QualityConfig, progress: Progress
) -> dict[str, Any]:
    """Compare a quantized checkpoint (or a package) with the float checkpoint that it was made of.

    Returns what the manifest records: losses with their controls, changes with 95 % intervals over documents, KL
    divergence, agreement, the share of the gain that is kept, gate-weighted row errors, the verdict.
    """
    checkpoint = open_checkpoint(checkpoint_folder)
    rows = FloatTables(checkpoint)
    with progress.task("open the float model"):
        model = float_model(checkpoint)
    windows, digest = read_windows(checkpoint, config, context_of(model), progress)
    judge = Judge(model, rows, windows, progress)
    prompts = [w for w in windows if len(w.ids_T) >= config.prompt_tokens][:: max(1, len(windows) // config.prompts)]
    prompts = [Window(w.document, w.ids_T[: config.prompt_tokens]) for w in prompts[: config.prompts]]
    written = None
    if prompts and config.written_tokens:
        texts = continuations(model, rows, prompts, config.written_tokens, progress)
        written = Judge(model, rows, texts, progress)
    with open_source(quantized) as (manifest, layout, tables):
        if layout.to_json() != checkpoint.layout.to_json():
            raise QualityError(f"{quantized} has another layout than {checkpoint_folder}: it was made of another one")
        stored: Rows = rows if tables is None else StoredRows(tables)
        reference = BackboneRef.from_json(manifest["backbone"])
        other = None
        if reference != checkpoint.backbone and reference.sha256 != checkpoint.backbone.sha256:
            with progress.task("open the quantized backbone"):
                other = Readout(float_model(checkpoint, reference, quantized))
        report = _figures(judge, written, stored, other, config)
    return report | {"documents_sha256": digest}


def _figures(
    judge: Judge, written: Judge | None, stored: Rows, other: Readout | None, config: QualityConfig
) -> dict[str, Any]:
    seed = config.seed
    both = judge.measure(stored, other)
    controls: dict[str, Measured] = {
        "zero_table": judge.measure(zero_rows(stored), other, divergence=False, label="control: zero table"),
        "shuffled_rows": judge.measure(
            shuffled_rows(stored, judge.layout, seed), other, divergence=False, label="control: shuffled rows"
        ),
    }
    report: dict[str, Any] = {
        "tokens": len(judge.document_N), "documents": len(set(judge.document_N.tolist())), "dtype": DTYPE,
        "loss": {
            "backbone": judge.loss(judge.base), "float": judge.loss(judge.float), "quantized": judge.loss(both),
            **{name: judge.loss(measured) for name, measured in controls.items()},
        },
        "change": judge.change(both, seed),
        "gain_kept": judge.gain_kept(both, seed),
        **judge.divergence(both, seed),
        "row_error": layers_of(judge.row_errors(stored)),
    }  # fmt: skip
    if other is not None:
        tables = judge.measure(stored, label="tables alone")
        backbone = judge.measure(judge.rows, other, label="backbone alone")
        bare = judge.measure(None, other, divergence=False, label="quantized backbone without memory")
        report["parts"] = {
            "tables": {"change": judge.change(tables, seed), "gain_kept": judge.gain_kept(tables, seed),
                       **judge.divergence(tables, seed)},
            "backbone": {"change": judge.change(backbone, seed), **judge.divergence(backbone, seed),
                         "without_memory": judge.loss(bare), "gain_on_it": judge.loss(bare) - judge.loss(both)},
        }  # fmt: skip
    if written is not None:
        measured = written.measure(stored, other, label="fixed continuations")
        report["continuations"] = {
            "texts": len(written.windows), "tokens": len(written.document_N), "loss": written.loss(written.float),
            "change": written.change(measured, seed), **written.divergence(measured, seed),
        }  # fmt: skip
    if config.max_loss is not None:
        bound = config.max_loss.nats(judge.loss(judge.float))
        report["max_loss"] = {"asked": str(config.max_loss), "nats": bound}
        report["passed"] = report["change"]["ci95"][1] <= bound
    return report


def settle(candidate: Path, out: Path, report: Mapping[str, Any]) -> Path:
    """Record the report in the candidate's manifest and put it under its name, or aside where it did not pass."""
    manifest = json.loads((candidate / MANIFEST).read_bytes())
    write_whole(candidate / MANIFEST, (json.dumps(manifest | {"quality": report}, indent=1) + "\n").encode())
    sync_path(candidate)
    place = out if report.get("passed", True) else out.with_name(out.name + ".rejected")
    put_in_place(candidate, place)
    return place


def remove_candidate(candidate: Path) -> None:
    """What a run that failed in its gate leaves behind."""
    shutil.rmtree(candidate, ignore_errors=True)
